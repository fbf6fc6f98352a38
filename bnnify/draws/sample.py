"""The reparameterized sample of a mean-field Gaussian posterior."""

__all__ = ["sample"]

from typing import Any

import torch
from torch import Tensor

from ..distributions.gaussian import std
from .noise import noise_like
from .replay import with_waiting


def sample(mean: Tensor, rho: Tensor, noise: Tensor | None = None) -> Tensor:
    """w = μ + softplus(ρ)·ε with ε ~ N(0, 1), one sample of the shape, dtype and device of ``mean``.

    ``noise`` is ε. Default: None, fresh noise.

    Gradients flow to both arguments; ε is kept for the backward pass of this sample alone, so that any number of
    samples may precede one backward.

    References:
        Blundell et al. 2015, "Weight Uncertainty in Neural Networks", section 3.2.
    """
    return _Reparameterize.apply(mean, rho, noise_like(mean) if noise is None else noise)


class _Reparameterize(torch.autograd.Function):
    """w = μ + softplus(ρ)·ε; saves ρ and ε alone. ∂w/∂μ = 1 and ∂w/∂ρ = ε·sigmoid(ρ)."""

    generate_vmap_rule = True
    takes_waiting = True

    @staticmethod
    def forward(mean: Tensor, rho: Tensor, eps: Tensor) -> Tensor:
        return torch.addcmul(mean, std(rho).to(mean.dtype), eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rho, eps = ctx.saved_tensors
        grad = with_waiting(ctx, grad)
        needs_mean, needs_rho, needs_eps = ctx.needs_input_grad
        return (
            grad if needs_mean else None,
            grad * eps * rho.sigmoid() if needs_rho else None,
            grad * std(rho).to(grad.dtype) if needs_eps else None,
        )
