"""The rules for the σ with which a posterior starts."""

__all__ = [
    "DEFAULT_POSTERIOR_STD",
    "Constant",
    "MeasuredStd",
    "Moped",
    "NamedPosteriorStd",
    "PosteriorStd",
    "Relative",
    "as_posterior_std",
    "fan_in_scale",
]

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..errors import ConversionError, check_positive
from .gaussian import at_least_float32, root_mean_square


class PosteriorStd(Protocol):
    """A rule for the σ that a posterior starts with."""

    def __call__(self, weight: Tensor, scale: float) -> Tensor:
        """Return σ, a scalar or one of the weight's shape; ``scale`` stands in for a weight that is all zero."""


@runtime_checkable
class NamedPosteriorStd(Protocol):
    """A rule that knows each parameter by its name; of what it returns, only the rms of σ is recorded."""

    def of(self, names: Sequence[str], weight: Tensor, scale: float, units_dim: int) -> Tensor:
        """Return σ, of the weight's shape, for the parameter that has these names.

        ``scale`` stands in for a weight that is all zero, and the layer's output units lie along ``units_dim``.
        """


@runtime_checkable
class MeasuredStd(Protocol):
    """A rule that runs the model before it can tell σ."""

    def measure(self, model: nn.Module, names: Iterable[str]) -> NamedPosteriorStd:
        """Return the rule for the parameters that have these names in ``model``."""

    def finish(self, bnn: Any) -> None:
        """See to the σ of the converted model, the whole of which is known now."""


@dataclass(frozen=True)
class Relative:
    """σ = fraction · min(1, √(units / full_width)) · rms(w), one σ for the whole tensor.

    The units are those that the layer puts out, the tensor's first dimension. The next layer averages over their
    independent errors, and the fewer they are, the less it averages: a layer of six channels bears less noise than one
    of six hundred. An all-zero tensor (a fresh bias, LoRA's B) takes the scale of its layer's initialisation as rms(w).

    Args:
        fraction: σ as a fraction of the root mean square of the tensor. Must be positive.
        full_width: The number of units from which on a layer gets the whole fraction. Default: ``1``, any number.
    """

    fraction: float
    full_width: int = 1

    def __post_init__(self) -> None:
        check_positive("Relative(fraction)", self.fraction)
        check_positive("Relative(full_width)", self.full_width)

    def __call__(self, weight: Tensor, scale: float) -> Tensor:
        own = root_mean_square(weight)
        units = len(weight) if weight.ndim else 1
        fraction = self.fraction * min(1.0, math.sqrt(units / self.full_width))
        return fraction * torch.where(own > 0, own, scale)


@dataclass(frozen=True)
class Moped:
    """``σ = δ·|w|``, elementwise: each weight's uncertainty is proportional to the weight.

    A weight near zero would be certain to be zero; σ is therefore at least δ/1000 of the tensor's rms.

    References:
        Krishnan et al. 2020, "Specifying Weight Priors in Bayesian Deep Neural Networks with Empirical Bayes", eq. 7.
    """

    delta: float

    def __post_init__(self) -> None:
        check_positive("Moped(delta)", self.delta)

    def __call__(self, weight: Tensor, scale: float) -> Tensor:
        floor = Relative(1e-3 * self.delta)(weight, scale)
        return (self.delta * at_least_float32(weight).abs()).maximum(floor)


@dataclass(frozen=True)
class Constant:
    """σ = std for every weight; a bare number given as ``posterior_std`` means this."""

    std: float

    def __post_init__(self) -> None:
        check_positive("posterior_std", self.std)

    def __call__(self, weight: Tensor, scale: float) -> Tensor:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return torch.full((), self.std, dtype=dtype, device=weight.device)


def as_posterior_std(rule: Any) -> PosteriorStd | NamedPosteriorStd:
    """Turn what a user gave as ``posterior_std``, if it needs no measurement, into a rule.

    Raises:
        ConversionError: It is neither a positive number nor a rule.
    """
    if isinstance(rule, (int, float)) and not isinstance(rule, bool):
        return Constant(float(rule))
    if (callable(rule) or isinstance(rule, NamedPosteriorStd)) and not isinstance(rule, type):
        return rule
    raise ConversionError(
        f"Unknown posterior_std {rule!r}: a positive number, Relative(fraction), Moped(delta), a ResponseStd, or a "
        "FisherStd."
    )


def fan_in_scale(weight: Tensor) -> float:
    """1/√(3·fan_in), the std with which PyTorch initialises a layer of this ``weight``."""
    fan_in = weight[0].numel() if weight.ndim > 1 else weight.numel()
    return 1 / math.sqrt(3 * max(fan_in, 1))


DEFAULT_POSTERIOR_STD = Relative(0.04)
