"""Bayesian parameters: where they stand in a model, their settings, and their posterior as it is now."""

__all__ = [
    "INITIAL_STD",
    "PRIOR_MEAN",
    "RHO",
    "BayesianParameter",
    "Settings",
    "bayesian_parameters",
    "is_bayesian",
    "is_derived",
    "settings_of",
    "unique_bayesian_parameters",
]

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from ..distributions.gaussian import is_pruned, rho_from_std, rms_std
from ..distributions.initial_std import PosteriorStd
from ..distributions.prior import KLTerms, MonteCarloPrior, Posterior, Prior
from ..draws.companions import COMPANIONS, INITIAL_STD, PRIOR_MEAN, RHO, as_buffer, from_buffer
from ..draws.estimators import POINT
from ..draws.sample import sample
from ..draws.sample_and_kl import can_fuse, kl_of, sample_and_kl
from ..draws.sharding import is_sharding, reshard
from ..draws.slot import Active, has_draw, read
from ..errors import ConversionError, DrawError


@dataclass(eq=False)
class Settings:
    """How one parameter of one module is Bayesian, and what reading it gives at the moment.

    Attributes:
        prior: p(w).
        posterior_std: The rule for the σ that the posterior starts with.
        estimator: Where the noise is put.
        instead: Which estimator was asked for instead, and why the layer cannot have it; empty if it has it.
        scale: The std of the layer's initialisation, for the rule.
        units_dim: The dimension along which the layer's output units lie, for the rule.
        called_again: The number of the draw in which the layer was called more than once with an estimator other than
            the weight sample, which it uses ever since. None before.
        pruned: Whether some of its weights were pruned.
        active: What reading gives.
    """

    prior: Prior
    posterior_std: PosteriorStd
    estimator: str
    scale: float = math.nan
    units_dim: int = 0
    instead: str = ""
    called_again: int | None = None
    pruned: bool = False
    active: Active = field(default_factory=Active)

    def __str__(self) -> str:
        how = " (KL by Monte Carlo)" if self.prior.needs_sample else ""
        instead = f" (not {self.instead})" if self.instead else ""
        if self.estimator == POINT:
            return f"{POINT}, prior={self.prior}"
        return f"{self.estimator}{instead}, prior={self.prior}{how}, std={self.posterior_std}"

    def copy(self) -> "Settings":
        """The same settings for another place that holds the same parameter."""
        return dataclasses.replace(self, active=Active())

    def initial_rho(self, name: str, weights: Tensor) -> Tensor:
        """The ρ, of the same dtype and device, with which the posterior of ``weights`` starts.

        It is a scalar where it is the same for all of them, and of their shape otherwise.

        Raises:
            ConversionError: The rule for σ returns one of another shape, or one that is negative or NaN.
        """
        # A rule may count on the units being the first dimension.
        start = self.posterior_std(weights.detach().movedim(self.units_dim, 0), self.scale)
        start = torch.as_tensor(start, device=weights.device)
        start = start.movedim(0, self.units_dim) if start.ndim == weights.ndim else start
        if start.shape not in ((), weights.shape) or not (start.is_meta or (start >= 0).all()):
            raise ConversionError(
                f"posterior_std={self.posterior_std} gives `{name}`, of shape {tuple(weights.shape)}, a σ of shape "
                f"{tuple(start.shape)}, or one that is negative or NaN. Return a scalar or one σ for each weight."
            )
        return rho_from_std(start.to(weights.dtype))


@dataclass(frozen=True)
class BayesianParameter:
    """One Bayesian parameter of a converted model, looked at where it stands now.

    Attributes:
        name: The qualified name, such as ``layer1.0.conv1.weight``.
        module: The module that holds it.
        attribute: Its name there, such as ``weight``.
    """

    name: str
    module: nn.Module
    attribute: str

    @property
    def settings(self) -> Settings:
        return settings_of(self.module)[self.attribute]

    @property
    def active(self) -> Active:
        return self.settings.active

    @property
    def mean(self) -> Tensor:
        """The posterior mean: the parameter itself, whatever draw is in effect."""
        return cast(Tensor, self.module._parameters[self.attribute])

    @property
    def rho(self) -> Tensor:
        """ρ; the posterior's standard deviation is softplus(ρ). None, against its type, where :attr:`is_point`."""
        return cast(Tensor, self.module._parameters[self.attribute + RHO])

    @property
    def is_point(self) -> bool:
        """Whether the posterior is all at its mean, without noise and without ρ."""
        return self.settings.estimator == POINT

    @property
    def kept_mean(self) -> Tensor:
        """The posterior mean with a zero for each weight that was pruned, to which no gradient flows."""
        return self.mean.masked_fill(is_pruned(self.rho), 0.0) if self.settings.pruned else self.mean

    @property
    def prior_mean(self) -> Tensor | None:
        """The pretrained weights, for a prior that is centred on them; None otherwise."""
        return self.module._parameters.get(self.attribute + PRIOR_MEAN)

    @property
    def initial_std(self) -> Tensor | None:
        """The root mean square of the σ that the posterior started with, of shape (1,), if the prior asks for it."""
        return self.module._buffers.get(self.attribute + INITIAL_STD)

    @torch.no_grad()
    def refresh_initial_std(self, assign: bool = False) -> None:
        """Let the prior that takes its scale from the initial σ follow pretrained weights that were loaded just now.

        With ``assign`` another buffer takes the place of the one that is there, which stays as it is.
        """
        if self.initial_std is None:
            return
        weights = self.mean if self.prior_mean is None else self.prior_mean
        known = as_buffer(rms_std(self.settings.initial_rho(self.name, weights)))
        if assign or self.initial_std.is_meta:
            self.module._buffers[self.attribute + INITIAL_STD] = known
        else:
            self.initial_std.copy_(known)

    def sample(self) -> Tensor:
        """One reparameterized sample, from which gradients flow to mean and ρ; the mean of a point posterior."""
        return self.mean if self.is_point else sample(self.kept_mean, self.rho)

    def kl(self) -> Tensor:
        """KL(q‖p) of this parameter in nats, summed over its elements; if by Monte Carlo, on the draw in effect.

        For a point posterior it is -log p(w), and weights that were pruned do not count.

        Raises:
            ConversionError: The prior does not give one number for each weight.
        """
        terms = self._terms()
        if terms is not None:
            return self._with_density(kl_of(self.mean, self.rho, terms), self._drawn())
        prior, posterior = self.settings.prior, self._posterior_for_kl()
        kl = self._checked(prior.penalty(posterior) if self.is_point else prior.kl(posterior))
        kl = (kl if posterior.kept is None else torch.where(posterior.kept, kl, 0.0)).sum()
        # Of a sharded parameter it is a sum of which every rank has computed its part.
        return kl.full_tensor() if hasattr(kl, "full_tensor") else kl

    def sample_and_kl(self) -> tuple[Tensor, Tensor] | None:
        """One sample and, as of :meth:`kl`, the KL at it, in one pass; None where each has to be computed by itself."""
        terms = self._terms()
        if terms is None:
            return None
        drawn, kl = sample_and_kl(self.mean, self.rho, terms)
        return drawn, self._with_density(kl, drawn)

    def _terms(self) -> KLTerms | None:
        """What the KL is made of, if it can be computed from that."""
        if self.settings.pruned or self.is_point:
            return None
        terms = self.settings.prior.fast_terms(self._posterior(self.rho))
        return terms if terms is not None and can_fuse(self.mean, self.rho, terms) else None

    def _with_density(self, kl: Tensor, drawn: Tensor | None) -> Tensor:
        """The KL with the part that a prior known by its density takes from the sample."""
        prior = self.settings.prior
        if drawn is None or not isinstance(prior, MonteCarloPrior):
            return kl
        return kl - self._checked(prior.log_prob(drawn)).sum()

    def _drawn(self) -> Tensor | None:
        """The sample for a prior that needs one: that of the draw in effect, or else a fresh one."""
        if not self.settings.prior.needs_sample or self.is_point:
            return None
        return read(self.active, self.mean) if has_draw(self.active) else sample(self.mean, self.rho)

    def _checked(self, kl: Tensor) -> Tensor:
        if kl.shape != self.mean.shape:
            raise ConversionError(
                f"The prior {self.settings.prior} gives `{self.name}`, of shape {tuple(self.mean.shape)}, a KL of "
                f"shape {tuple(kl.shape)}. Return that of each weight, without a sum."
            )
        return kl

    def _posterior_for_kl(self) -> Posterior:
        rho, drawn, kept = self.rho, self._drawn(), None
        if self.settings.pruned:
            kept = ~is_pruned(rho)
            rho = torch.where(kept, rho, 0.0)  # what is discarded must be finite, for the sake of the gradient
        return self._posterior(rho, drawn, kept)

    def _posterior(self, rho: Tensor, drawn: Tensor | None = None, kept: Tensor | None = None) -> Posterior:
        prior_mean, initial_std = self.prior_mean, self.initial_std
        return Posterior(
            self.mean,
            rho,
            # Nothing trains the prior, whatever flag it bears as a DTensor.
            prior_mean.detach() if prior_mean is not None and prior_mean.requires_grad else prior_mean,
            None if initial_std is None else from_buffer(initial_std),
            drawn,
            kept,
        )


def bayesian_parameters(root: nn.Module) -> Iterator[BayesianParameter]:
    """Every Bayesian parameter under ``root``, a tied one once for each module that holds it.

    Where FSDP2 has sharded a module under ``root``, it is the sharded parameter.

    Raises:
        DrawError: A module was changed after its conversion in a way that took the parameter out of its hands.
    """
    for module_name, module in root.named_modules():
        if is_sharding(module):
            reshard(module)
        for attribute in settings_of(module):
            mean = module._parameters.get(attribute)
            if mean is None and attribute in module._parameters:
                continue  # a bias that was set to None
            rho = module._parameters.get(attribute + RHO)
            parameter = BayesianParameter(f"{module_name}.{attribute}".removeprefix("."), module, attribute)
            if mean is None or not (parameter.is_point or (rho is not None and mean.shape == rho.shape)):
                _refuse_surgery(parameter)
            yield parameter


def unique_bayesian_parameters(root: nn.Module) -> Iterator[BayesianParameter]:
    """Every Bayesian parameter under ``root`` once, under the first of its names."""
    seen = set()
    for parameter in bayesian_parameters(root):
        if id(parameter.mean) not in seen:
            seen.add(id(parameter.mean))
            yield parameter


def is_bayesian(module: nn.Module) -> bool:
    """Whether ``module`` itself (not only a child of it) has Bayesian parameters."""
    return hasattr(type(module), "_plain_class")


def settings_of(module: nn.Module) -> dict[str, Settings]:
    """The Bayesian parameters of ``module`` itself, by attribute, with their settings; empty for a plain module."""
    return module.__dict__["_bayesian"] if is_bayesian(module) else {}


def is_derived(module: nn.Module, attribute: str) -> bool:
    """Whether this parameter of ``module`` is the ρ or the prior mean of another one."""
    settings = settings_of(module)
    return any(attribute.endswith(ending) and attribute.removesuffix(ending) in settings for ending in COMPANIONS)


def _refuse_surgery(parameter: BayesianParameter) -> None:
    mean, rho = (parameter.module._parameters.get(parameter.attribute + ending) for ending in ("", RHO))
    if mean is None:
        found = "it is no longer a parameter of its module"
    elif rho is None:
        found = "its rho is no longer a parameter of its module"
    else:
        found = f"its shape is now {tuple(mean.shape)} but that of its rho is {tuple(rho.shape)}"
    raise DrawError(
        f"Cannot sample `{parameter.name}` ({type(parameter.module).__name__}): {found}. The module was changed after "
        "its conversion (torch's pruning, weight norm, a parametrization, resizing?). "
        "Call bnnify.collapse first, change the model, and convert it again."
    )
