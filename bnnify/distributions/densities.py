"""Densities and moments that priors need, with derivatives that neither overflow nor cancel."""

__all__ = ["MeanAbsolute", "MixtureLogProb", "gaussian_log_prob", "log"]

import math
from typing import Any

import torch
from torch import Tensor

from .gaussian import std


class MeanAbsolute(torch.autograd.Function):
    """E|x| = σ·√(2/π)·exp(-r²/2) + d·erf(r/√2) of x ~ N(d, σ²), with r = d/σ.

    Its derivatives are erf(r/√2) for d and √(2/π)·exp(-r²/2) for σ: that of r, which overflows, cancels.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(distance: Tensor, sigma: Tensor) -> Tensor:
        ratio = _ratio(distance, sigma)
        return torch.addcmul(_density(ratio) * sigma, distance, torch.erf(ratio / math.sqrt(2)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        ratio = _ratio(*ctx.saved_tensors)
        return grad * torch.erf(ratio / math.sqrt(2)), grad * _density(ratio)


def _ratio(distance: Tensor, sigma: Tensor) -> Tensor:
    # Beyond 40 σ nothing changes any more, and d/σ would overflow. Where d is zero, σ may be so too.
    least = (distance.detach().abs() / 40).clamp(min=torch.finfo(sigma.dtype).tiny)
    return distance / sigma.maximum(least)


def _density(ratio: Tensor) -> Tensor:
    """√(2/π)·exp(-r²/2), twice the density of N(0, 1)."""
    return math.sqrt(2 / math.pi) * torch.exp(-0.5 * ratio.square())


class MixtureLogProb(torch.autograd.Function):
    """log(π₁·N(w; 0, s₁²) + π₂·N(w; 0, s₂²)) with s₁ >= s₂; of the weights nothing else is kept for backward.

    With z the logarithm of the second term less that of the first it is the first plus softplus(z), without
    cancellation since z is largest at zero. Its derivative is -w·(r/s₂² + (1 - r)/s₁²), where r = sigmoid(z) is the
    share that the second component has in the weight.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weights: Tensor, wide: tuple[float, float], narrow: tuple[float, float]) -> Tensor:
        return gaussian_log_prob(weights, wide[0]).add_(math.log(wide[1])).add_(std(_log_ratio(weights, wide, narrow)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.components = inputs[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weights,), (wide, narrow) = ctx.saved_tensors, ctx.components
        share = _log_ratio(weights, wide, narrow).sigmoid()
        precision = share * (narrow[0] ** -2 - wide[0] ** -2) + wide[0] ** -2
        return -grad * weights * precision, None, None


def _log_ratio(weights: Tensor, wide: tuple[float, float], narrow: tuple[float, float]) -> Tensor:
    """Compute z from the std and the share of each component."""
    constant = math.log(narrow[1] / wide[1]) + math.log(wide[0] / narrow[0])
    return weights.square().mul_(0.5 * (wide[0] ** -2 - narrow[0] ** -2)).add_(constant)


def gaussian_log_prob(distance: Tensor, std: Tensor | float) -> Tensor:
    """log N(x; m, std²) of each weight, from its ``distance`` x - m."""
    return -0.5 * (distance / std).square() - (log(std) + 0.5 * math.log(2 * math.pi))


def log(scale: Any) -> Any:
    """log of a scale that is a number or a tensor."""
    return scale.log() if isinstance(scale, Tensor) else math.log(scale)
