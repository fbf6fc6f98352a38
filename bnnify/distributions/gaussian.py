"""The mean-field Gaussian posterior N(μ, σ²) with σ = softplus(ρ), its σ and ρ."""

__all__ = [
    "PRUNED",
    "at_least_float32",
    "dtype_of_rho",
    "has_pruned",
    "is_pruned",
    "log_std",
    "rho_from_std",
    "rms_std",
    "root_mean_square",
    "std",
]


import torch
import torch.nn.functional as F
from torch import Tensor

PRUNED = -(2.0**14)
"""The ρ of a weight that was pruned: its σ is exactly zero. Every dtype can hold it, and no training reaches it."""


def std(rho: Tensor) -> Tensor:
    """σ = softplus(ρ) = log(1 + e^ρ)."""
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
    """ρ with softplus(ρ) = σ; a σ that the dtype cannot hold, such as zero, becomes the nearest that it can."""
    limits = torch.finfo(std.dtype)
    wide = at_least_float32(std).clamp(limits.tiny, limits.max)
    # log(e^σ - 1) = σ + log(1 - e^-σ), which neither overflows for large σ nor cancels for small.
    return (wide + torch.log(-torch.expm1(-wide))).to(std.dtype)


def is_pruned(rho: Tensor) -> Tensor:
    """Mark the pruned weights, in the shape of ``rho``, also after an optimizer's momentum has moved ρ a little."""
    return rho < PRUNED / 2


def has_pruned(rho: Tensor) -> bool:
    """Tell whether any weight was pruned."""
    return not rho.is_meta and bool(is_pruned(rho.detach()).any())


def rms_std(sigma: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute the root mean square of σ, as far as ρ can hold it for weights of this dtype: a scalar."""
    return root_mean_square(std(rho_from_std(sigma.to(dtype_of_rho(dtype)))))


def dtype_of_rho(dtype: torch.dtype) -> torch.dtype:
    """The dtype of ρ for weights of ``dtype``: float32 for half precision, in which a training step would be lost.

    Near ρ = -5 the numbers of bfloat16 are 1/32 apart, and an optimizer moves ρ by its learning rate.
    """
    return torch.promote_types(dtype, torch.float32)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Widen half precision, in which sums and logarithms of small numbers are lost."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def root_mean_square(tensor: Tensor) -> Tensor:
    """√(mean of squares), in units of the largest element so that no square vanishes; NaN for a tensor of zeros."""
    tensor = at_least_float32(tensor)
    largest = tensor.abs().amax()
    return largest * (tensor / largest).square().mean().sqrt()
