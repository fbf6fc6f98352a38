"""Small regression networks of one shape, trained side by side, and how good their predictions are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import bnnify

from ..harness.fit import fit
from .uci_data import Parts

LEARNING_RATE = 1e-2
TUNING_RATE = 3e-3
RHO_RATE = 2e-2
FIRST_NOISE = 0.5
"""The std of the noise as a training begins, with targets of the std 1."""

NLL = bnnify.GaussianNLL | bnnify.HeteroscedasticGaussianNLL


class Networks(nn.Module):
    """S networks with one hidden layer of rectifiers, none of which knows of the others: (S, N, features) to (S, N, 1).

    Side by side they take a fraction of the time that they would one after the other.
    """

    outputs = 1

    def __init__(self, count: int, features: int, hidden: int) -> None:
        super().__init__()
        self.w1 = _uniform(count, features, hidden, fan_in=features)
        self.b1 = _uniform(count, 1, hidden, fan_in=features)
        self.w2 = _uniform(count, hidden, self.outputs, fan_in=hidden)
        self.b2 = _uniform(count, 1, self.outputs, fan_in=hidden)

    def forward(self, x: Tensor) -> Any:
        hidden = torch.baddbmm(self.b1, x, self.w1).relu()
        return torch.baddbmm(self.b2, hidden, self.w2)

    def nll(self) -> NLL:
        """What they are trained by: each has one std for the noise of its data, which it learns."""
        return bnnify.GaussianNLL(std=torch.full((len(self.w1), 1, 1), FIRST_NOISE), learned=True)

    @staticmethod
    def fit(found: Tensor, learned: Tensor, targets: Tensor) -> Tensor:
        """What held-out targets ask for, (S, 1, 1): here a std for the noise, whatever was learned."""
        return fitted_noise(found, targets)

    @staticmethod
    def noise(fit: Tensor, learned: Tensor) -> Tensor:
        """The noise with what was fitted to held-out targets, of the shape of what was learned."""
        return fit.expand_as(learned)

    def alone(self, number: int) -> Networks:
        """One of them."""
        features, hidden = self.w1.shape[1:]
        one = type(self)(1, features, hidden)
        one.load_state_dict({name: value[number : number + 1] for name, value in self.state_dict().items()})
        return one


class NoisyNetworks(Networks):
    """Networks that predict how noisy each target is: a pair of means and variances, both of the shape (S, N, 1)."""

    outputs = 2

    def __init__(self, count: int, features: int, hidden: int) -> None:
        super().__init__(count, features, hidden)
        with torch.no_grad():
            self.b2[..., 1] = 2 * math.log(FIRST_NOISE)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = super().forward(x).split(1, -1)
        # Far beyond what any of them says: one step that goes wrong must not end in NaN for ever.
        return mean, log_variance.clamp(-30.0, 30.0).exp()

    def nll(self) -> NLL:
        return bnnify.HeteroscedasticGaussianNLL()

    @staticmethod
    def fit(found: Tensor, learned: Tensor, targets: Tensor) -> Tensor:
        """A factor on the noise that was learned."""
        return fitted_factor(found, learned, targets)

    @staticmethod
    def noise(fit: Tensor, learned: Tensor) -> Tensor:
        return fit * learned


def train(
    model: nn.Module,
    nll: NLL,
    parts: Parts,
    steps: int,
    batch_size: int,
    weight_decay: float = 0.0,
    description: str = "training",
) -> None:
    """Trains networks and what they know of the noise, by the likelihood or, if they are Bayesian, by the ELBO."""
    networks, size, features = parts.inputs.shape
    noise = {"params": nll.parameters(), "lr": LEARNING_RATE, "weight_decay": 0.0}
    if isinstance(model, bnnify.BayesianModel):
        groups = model.parameter_groups(lr=TUNING_RATE, rho_lr=RHO_RATE)
    else:
        groups = [{"params": model.parameters(), "lr": LEARNING_RATE}]
    optimizer = torch.optim.AdamW([*groups, noise], weight_decay=weight_decay, fused=True)

    def loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """The sum over the networks: what one of them has no part in has no gradient for it."""
        if not isinstance(model, bnnify.BayesianModel):
            return networks * nll(model(inputs), targets)
        output, kl = model(inputs)
        return bnnify.elbo(networks * nll(output, targets), kl, num_data=size)

    flat = (parts.inputs.reshape(-1, features), parts.targets.reshape(-1, 1))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    indices = _indices(networks, size, min(batch_size, size), steps)
    fit(model, optimizer, flat, indices, loss, schedule=schedule, steps=steps, description=description)


@torch.no_grad()
def densities(model: nn.Module, nll: NLL, inputs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of what each of ``count`` networks says of the targets, both (count, S, N, 1).

    Of a deterministic model there is one network.
    """
    likelihood = nll.likelihood()
    if not isinstance(model, bnnify.BayesianModel):
        normals = [likelihood.distribution(model(inputs))]
    else:
        normals = []
        for _ in range(count):
            with model.draw():
                normals.append(likelihood.distribution(model.module(inputs)))
    return torch.stack([normal.mean for normal in normals]), torch.stack([normal.stddev for normal in normals])


def scores(found: Tensor, noise: Tensor, parts: Parts) -> dict[str, Tensor]:
    """RMSE, log-likelihood and coverage of 90 % intervals of each of S predictions, in the units of the data.

    Args:
        found: The outputs of K networks, shape (K, S, N, 1), of which the predictive density is the average.
        noise: The std of the noise of each, shape (K, S, N, 1).
        parts: The held-out targets.
    """
    error = parts.held_targets - found.mean(0)
    std = (found.var(0, correction=0) + noise.square().mean(0)).sqrt()
    return {
        "RMSE": error.square().mean((1, 2)).sqrt() * parts.scale,
        "LL": _log_likelihood(found, noise, parts.held_targets) - parts.scale.log(),
        "coverage": (error.abs() < 1.6449 * std).float().mean((1, 2)),
    }


def fitted_noise(found: Tensor, targets: Tensor) -> Tensor:
    """The std of the noise by which the average of K networks' densities is most likely, shape (S, 1, 1)."""
    rmse = (targets - found.mean(0)).square().mean((1, 2), keepdim=True).sqrt()
    return rmse * fitted_factor(found, rmse, targets)


def fitted_factor(found: Tensor, noise: Tensor, targets: Tensor) -> Tensor:
    """The factor on the noise by which the average of K networks' densities is most likely, shape (S, 1, 1)."""
    candidates = torch.logspace(-1.5, 1.0, 126)
    likelihoods = [_log_likelihood(found, factor * noise, targets) for factor in candidates.tolist()]
    return candidates[torch.stack(likelihoods).argmax(0)][:, None, None]


def _log_likelihood(found: Tensor, noise: Tensor, targets: Tensor) -> Tensor:
    """log mean_k N(y; f_k, s²), averaged over the data of each of S predictions."""
    log_prob = -((targets - found) / noise).square() / 2 - noise.log() - math.log(2 * math.pi) / 2
    return (log_prob.logsumexp(0) - math.log(len(found))).mean((1, 2))


def _indices(networks: int, size: int, batch_size: int, steps: int) -> Iterator[Tensor]:
    """Batches for each of the networks, in an order of its own, as rows of what is stacked to (S · N, ...)."""
    per_epoch = size // batch_size
    first = size * torch.arange(networks)[:, None]
    for step in range(steps):
        number = step % per_epoch
        if number == 0:
            order = torch.rand(networks, size).argsort(1) + first
        yield order[:, number * batch_size : (number + 1) * batch_size]


def _uniform(*shape: int, fan_in: int) -> nn.Parameter:
    return nn.Parameter((2 * torch.rand(shape) - 1) / math.sqrt(fan_in))
