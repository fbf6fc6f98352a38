"""The mean-field Gaussian posterior N(μ, σ²) with σ = softplus(ρ), and the rules for the σ it starts with."""

__all__ = [
    "PRUNED",
    "Moped",
    "PosteriorStd",
    "Relative",
    "fan_in_scale",
    "has_pruned",
    "is_pruned",
    "log_std",
    "rho_from_std",
    "rms_std",
    "sample",
    "std",
]

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ConversionError
from .noise import noise_like
from .replay import saved_tensors

PRUNED = -(2.0**14)
"""The ρ of a weight that was pruned: its σ is exactly zero. Every dtype can hold it, and no training reaches it."""


def sample(mean: Tensor, rho: Tensor, noise: Tensor | None = None) -> Tensor:
    """One reparameterized sample w = μ + softplus(ρ)·ε with ε ~ N(0, 1), of the shape, dtype and device of ``mean``.

    ``noise`` is ε, where it has to be a given one.

    Gradients flow to both arguments; ε is kept for the backward pass of this sample alone, so that any number of
    samples may precede one backward.

    References:
        Blundell et al. 2015, "Weight Uncertainty in Neural Networks", section 3.2.
    """
    return _Reparameterize.apply(mean, rho, noise_like(mean) if noise is None else noise)


def std(rho: Tensor) -> Tensor:
    """The standard deviation σ = softplus(ρ) = log(1 + e^ρ)."""
    # The default threshold of 20, above which softplus(ρ) is taken to be ρ, is too low for float64.
    return F.softplus(rho, threshold=40.0)


def log_std(rho: Tensor) -> Tensor:
    """log σ, finite for every finite ρ, in float32 or better.

    Far to the left σ = softplus(ρ) underflows, but log σ → ρ - e^ρ/2 does not; where e^ρ no longer matters to the
    dtype, ρ itself is the answer.
    """
    rho = at_least_float32(rho)
    cut = -40.0 if rho.dtype == torch.float64 else -20.0
    # The clamp keeps the branch that `where` discards from poisoning the gradient with 0/0.
    return torch.where(rho <= cut, rho, std(rho.clamp(min=cut)).log())


def rho_from_std(std: Tensor) -> Tensor:
    """The ρ with softplus(ρ) = σ; a σ that the dtype cannot hold, such as zero, becomes the nearest that it can."""
    limits = torch.finfo(std.dtype)
    wide = at_least_float32(std).clamp(limits.tiny, limits.max)
    # log(e^σ - 1) = σ + log(1 - e^-σ), which neither overflows for large σ nor cancels for small.
    return (wide + torch.log(-torch.expm1(-wide))).to(std.dtype)


def is_pruned(rho: Tensor) -> Tensor:
    """Where weights were pruned, of the shape of ``rho``. An optimizer's momentum may since have moved ρ a little."""
    return rho < PRUNED / 2


def has_pruned(rho: Tensor) -> bool:
    """Whether any weight was pruned."""
    return not rho.is_meta and bool(is_pruned(rho.detach()).any())


class PosteriorStd(Protocol):
    """A rule for the σ that a posterior starts with."""

    def __call__(self, weight: Tensor, scale: float) -> Tensor:
        """Return σ, a scalar or one of the weight's shape; ``scale`` stands in for a weight that is all zero."""


@runtime_checkable
class NamedPosteriorStd(Protocol):
    """A rule that knows each parameter by its name. What is kept of it is the σ alone."""

    def of(self, names: Sequence[str], weight: Tensor, scale: float, units_dim: int) -> Tensor:
        """Return σ, of the weight's shape, for the parameter that has these names.

        ``scale`` stands in for a weight that is all zero, and the layer's output units lie along ``units_dim``.
        """


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
        own = _root_mean_square(weight)
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
    """The same σ for every weight; a bare number given as ``posterior_std`` means this."""

    std: float

    def __post_init__(self) -> None:
        check_positive("posterior_std", self.std)

    def __call__(self, weight: Tensor, scale: float) -> Tensor:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return torch.full((), self.std, dtype=dtype, device=weight.device)


def as_posterior_std(rule: Any) -> PosteriorStd | NamedPosteriorStd:
    """Turn what a user gave as ``posterior_std`` into a rule.

    Raises:
        ConversionError: It is neither a positive number nor a rule.
    """
    if isinstance(rule, (int, float)) and not isinstance(rule, bool):
        return Constant(float(rule))
    if (callable(rule) or isinstance(rule, NamedPosteriorStd)) and not isinstance(rule, type):
        return rule
    raise ConversionError(
        f"Unknown posterior_std {rule!r}: a positive number, a FisherStd, Relative(fraction) or Moped(delta)."
    )


def fan_in_scale(weight: Tensor) -> float:
    """The std 1/√(3·fan_in) with which PyTorch initialises a layer of this ``weight``."""
    fan_in = weight[0].numel() if weight.ndim > 1 else weight.numel()
    return 1 / math.sqrt(3 * max(fan_in, 1))


def rms_std(rho: Tensor) -> Tensor:
    """The root mean square of σ: a scalar, in float32 or better."""
    return _root_mean_square(std(at_least_float32(rho)))


def check_positive(name: str, value: Any) -> None:
    """Raise unless ``value``, which a user gave as ``name``, is a positive, finite number.

    Raises:
        ConversionError: It is not.
    """
    if isinstance(value, bool) or not (isinstance(value, (int, float)) and 0 < value < math.inf):
        raise ConversionError(f"{name} must be a positive, finite number, not {value!r}.")


def at_least_float32(tensor: Tensor) -> Tensor:
    """Widen half precision, in which sums and logarithms of small numbers are lost."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


class _Reparameterize(torch.autograd.Function):
    """w = μ + softplus(ρ)·ε; saves ρ and ε alone. ∂w/∂μ = 1 and ∂w/∂ρ = ε·sigmoid(ρ)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(mean: Tensor, rho: Tensor, eps: Tensor) -> Tensor:
        return torch.addcmul(mean, std(rho), eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rho, eps = saved_tensors(ctx)
        needs_mean, needs_rho, needs_eps = ctx.needs_input_grad
        return (
            grad if needs_mean else None,
            grad * eps * rho.sigmoid() if needs_rho else None,
            grad * std(rho) if needs_eps else None,
        )


def _root_mean_square(tensor: Tensor) -> Tensor:
    """√(mean of squares), in units of the largest element so that no square vanishes; NaN for a tensor of zeros."""
    tensor = at_least_float32(tensor)
    largest = tensor.abs().amax()
    return largest * (tensor / largest).square().mean().sqrt()
