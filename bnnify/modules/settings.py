"""The settings of a Bayesian parameter, which its conversion fixes, and its state, which may change."""

__all__ = ["PosteriorState", "Settings", "Slot", "is_bayesian", "plain_class", "slots_of"]

import math
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ..distributions.initial_std import PosteriorStd
from ..distributions.prior import Prior
from ..draws.estimators import DEFAULT
from ..draws.slot import Active
from ..errors import ConversionError, describe
from .mean_field import MeanField
from .point import Point
from .posterior import PosteriorFamily


@dataclass(frozen=True)
class Settings:
    """The choices made for one parameter at its conversion.

    Attributes:
        prior: p(w).
        posterior_std: The rule for the σ that the posterior starts with.
        estimator: Where a forward of its layer puts the noise. Default: the weight sample.
        posterior: The family of q(w). Default: ``MeanField()``.
        scale: The std of the layer's initialisation, for the rule.
        units_dim: The dimension along which the layer's output units lie, for the rule.
        fallback_reason: The estimator that was asked for, and why the layer cannot have it; empty if it has it.
    """

    prior: Prior
    posterior_std: PosteriorStd
    estimator: str = DEFAULT
    posterior: PosteriorFamily = field(default_factory=MeanField)
    scale: float = math.nan
    units_dim: int = 0
    fallback_reason: str = ""

    def __str__(self) -> str:
        if isinstance(self.posterior, Point):
            return f"point, prior={self.prior}"
        family = "" if isinstance(self.posterior, MeanField) else f"{self.posterior}, "
        fallback = f" (not {self.fallback_reason})" if self.fallback_reason else ""
        how = " (KL by Monte Carlo)" if self.prior.needs_sample else ""
        return f"{family}{self.estimator}{fallback}, prior={self.prior}{how}, std={self.posterior_std}"

    def initial_std(self, name: str, weights: Tensor) -> Tensor:
        """Compute the σ with which the posterior of ``weights`` starts: a scalar, or one for each of them.

        Raises:
            ConversionError: The rule returns no σ, one of another shape, or one that is negative or NaN.
        """
        # A rule may count on the units being the first dimension.
        std = self.posterior_std(weights.detach().movedim(self.units_dim, 0), self.scale)
        if not isinstance(std, (Tensor, Real)):
            found = describe(std)
        else:
            std = torch.as_tensor(std, device=weights.device)
            std = std.movedim(0, self.units_dim) if std.ndim == weights.ndim else std
            if std.shape in ((), weights.shape) and (std.is_meta or (std >= 0).all()):
                return std
            found = f"a σ of shape {tuple(std.shape)}, or one that is negative or NaN"
        raise ConversionError(
            f"posterior_std={self.posterior_std} gives `{name}`, of shape {tuple(weights.shape)}, {found}. "
            "Return a scalar or one σ for each weight."
        )


@dataclass(eq=False)
class PosteriorState:
    """The part of a posterior, beside its tensors, that may change; all places of a tied parameter share it."""

    has_pruned: bool = False
    """True if some of its weights were pruned."""


@dataclass(eq=False)
class Slot:
    """One place of a Bayesian parameter: its settings, its state, and the draw that reads see there.

    Compiled code looks at ``active`` by its path.
    """

    settings: Settings
    state: PosteriorState = field(default_factory=PosteriorState)
    active: Active = field(default_factory=Active)


def is_bayesian(module: nn.Module) -> bool:
    """Tell whether ``module`` itself (not only a child of it) has Bayesian parameters."""
    return hasattr(type(module), "_plain_class")


def plain_class(module: nn.Module) -> Any:
    """Return the class of ``module``, or, if that is a Bayesian one, the class that it was made of."""
    return getattr(type(module), "_plain_class", type(module))


def slots_of(module: nn.Module) -> dict[str, Slot]:
    """Return the slots of ``module`` itself, by attribute; empty for a plain module."""
    return module.__dict__["_bayesian"] if is_bayesian(module) else {}
