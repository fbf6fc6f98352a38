"""Ways to have several networks instead of one: what people would use instead of bnnify, and bnnify."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

import bnnify
from bnnify.distributions.gaussian import rho_from_std, std
from bnnify.modules.parameters import unique_bayesian_parameters

from . import peers
from .data import Images
from .fine_tuning import BATCH_SIZE, augmented, bfloat16, run_steps
from .fit import shuffled
from .networks.cifar_resnet import inputs
from .progress import track

Networks = Callable[[Tensor], Tensor]
"""From inputs, shape (N, ...), to the logits of K networks, shape (K, N, classes)."""

SWAG_RANK = 10
SWAG_BATCHES = 5
"""From which each network of SWAG has its statistics of batch norm."""


def together(*networks: nn.Module) -> Networks:
    """Networks as they are: one alone, or an ensemble."""
    for network in networks:
        network.eval()
    return lambda x: torch.stack([network(x) for network in networks])


def repeated(network: nn.Module, count: int) -> Networks:
    """A network that is another one in each forward."""
    network.eval()
    return lambda x: torch.stack([network(x) for _ in range(count)])


def posterior(bnn: bnnify.BayesianModel, count: int) -> Networks:
    bnn.eval()
    return lambda x: bnn.sample(x, num_samples=count)


@torch.no_grad()
def with_std_times(bnn: bnnify.BayesianModel, factor: float) -> bnnify.BayesianModel:
    """A copy with so many times each σ."""
    bnn = copy.deepcopy(bnn)
    for parameter in unique_bayesian_parameters(bnn.module):
        parameter.rho.copy_(rho_from_std(factor * std(parameter.rho)))
    return bnn


class Dropout(nn.Dropout):
    """Dropout that evaluation mode leaves on."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.p)


def with_dropout(network: nn.Module, rate: float) -> nn.Module:
    """A copy of a ResNet with dropout behind each of its three stages."""
    network = copy.deepcopy(network)
    for name in ("layer1", "layer2", "layer3"):
        getattr(network, name).append(Dropout(rate))
    return network


class Swag:
    """A Gaussian through the weights that SGD passes (Maddox et al. 2019): their mean, variances and deviations."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def collect(self, network: nn.Module) -> None:
        self.weights.append(torch.cat([each.detach().flatten() for each in network.parameters()]))

    def networks(self, network: nn.Module, count: int, scale: float, train: Images) -> list[nn.Module]:
        """Draws networks; batch norm gets the statistics of each from augmented training images."""
        weights = torch.stack(self.weights)
        mean, std = weights.mean(0), weights.std(0, correction=0)
        deviations = (weights - mean)[-SWAG_RANK:]
        drawn = []
        for _ in range(count):
            alone = std * torch.randn_like(std) / 2**0.5
            joint = torch.randn(len(deviations)) @ deviations / (2 * (len(deviations) - 1)) ** 0.5
            drawn.append(copy.deepcopy(network))
            write(drawn[-1], mean + scale * (alone + joint))
            batches = shuffled(len(train.labels), BATCH_SIZE, SWAG_BATCHES)
            with bfloat16():
                update_bn((augmented(train.pixels[index]) for index in batches), drawn[-1])
        return drawn


@torch.no_grad()
def write(network: nn.Module, weights: Tensor) -> None:
    """Sets all parameters from one vector."""
    parameters = list(network.parameters())
    for parameter, part in zip(parameters, weights.split([each.numel() for each in parameters]), strict=True):
        parameter.copy_(part.view(parameter.shape))


def ivon(network: nn.Module, train: Images, *, steps: int, lr: float, hess_init: float, count: int) -> Networks:
    """Fine-tunes a network by IVON (Shen et al. 2024), for as many steps as the others, with one draw in each."""
    from ivon import IVON

    optimizer = IVON(network.parameters(), lr=lr, ess=len(train.labels), hess_init=hess_init)
    run_steps(
        peers.deterministic(network),
        len(train.labels),
        train,
        optimizer,
        steps,
        schedule=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        around=lambda: optimizer.sampled_params(train=True),
        description=f"IVON, {hess_init}",
    )
    return ivon_networks(network, optimizer, count)


def ivon_networks(network: nn.Module, optimizer: Any, count: int) -> Networks:
    network.eval()

    def sample(x: Tensor) -> Tensor:
        drawn = []
        for _ in range(count):
            with optimizer.sampled_params():
                drawn.append(network(x))
        return torch.stack(drawn)

    return sample


def fitted_laplace(network: nn.Module, which: str, structure: str, train: Images, num_data: int) -> Any:
    """A Laplace approximation by laplace-torch from some training images, as if there were ``num_data`` of them."""
    import laplace
    from laplace.curvature import GGNInterface

    class ImageByImage(GGNInterface):
        """The Jacobians by plain backward passes: torch.func's take 30 times as long for this network on a CPU."""

        def jacobians(self, x: Tensor, enable_backprop: bool = False) -> tuple[Tensor, Tensor]:
            found, outputs = [], []
            with torch.enable_grad():
                for image in x:
                    output = self.model(image[None])[0]
                    gradients = [torch.autograd.grad(each, self.params, retain_graph=True) for each in output]
                    found.append(torch.stack([torch.cat([g.flatten() for g in each]) for each in gradients]))
                    outputs.append(output.detach())
            return torch.stack(found), torch.stack(outputs)

    made = laplace.Laplace(
        copy.deepcopy(network).to(memory_format=torch.contiguous_format),
        "classification",
        subset_of_weights=which,
        hessian_structure=structure,
        backend=ImageByImage,
    )
    data = TensorDataset(inputs(train.pixels).contiguous(), train.labels)
    made.fit(DataLoader(data, 10))
    made.H = made.H * (num_data / len(train.labels))
    return made


def laplace_networks(made: Any, precision: float, kind: str, count: int, batch: int = 100) -> Networks:
    """Predictions under a prior precision: ``"glm"`` of the linearised network, ``"nn"`` of sampled networks."""

    def sample(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):  # its algebra is in float32
            made.prior_precision = torch.tensor(precision)
            drawn = [
                made.predictive_samples(part.contiguous(), pred_type=kind, n_samples=count) for part in x.split(batch)
            ]
        return torch.cat(drawn, 1).clamp_min(torch.finfo(torch.float32).tiny).log()

    return sample


@torch.no_grad()
def predicted(networks: Networks, x: Tensor, description: str = "predicting") -> Tensor:
    """The logits of all inputs, shape (K, N, classes); each batch of a hundred draws networks of its own."""
    return torch.cat([networks(part).float() for part in track(x.split(100), description)], 1)
