"""The sample of a parameter and its KL in one function of autograd, which makes as few passes over them as it can."""

__all__ = ["can_fuse", "kl_of", "sample_and_kl"]

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..distributions.gaussian import std
from ..distributions.prior import KLTerms, Posterior
from ..torch_internals import in_transform, is_batched, is_traced, keeps_graph
from .companions import PriorMean
from .noise import noise_like
from .replay import with_waiting
from .sample import sample

_CUT = {torch.float32: -60.0, torch.float64: -600.0}
"""A ρ at which σ = e^ρ, with room to the smallest number of the dtype for the prior's factor."""


def can_fuse(mean: Tensor, rho: Tensor, terms: KLTerms) -> bool:
    """Tell whether both can be one function: of plain tensors in eager mode, with a prior whose squares are in range.

    Compilers fuse by themselves; ``torch.func`` and distributed tensors need operations that they can follow. A mode
    that only looks on (a profiler, a counter of operations) makes no difference: a checkpointed region may be run again
    without it, and has to save the same tensors then.
    """
    of_prior = [value for value in (terms.mean, terms.std) if isinstance(value, Tensor)]
    if any(value.requires_grad for value in of_prior):
        return False  # a prior of somebody's own learns it
    if isinstance(terms.std, Tensor) and terms.std.numel() != 1:
        return False  # of a prior of somebody's own, with a std for each weight
    same = [mean, rho, *([terms.mean] if isinstance(terms.mean, Tensor) else [])]
    return (
        mean.dtype in _CUT
        and all(type(t) in (Tensor, nn.Parameter, PriorMean) and not t.is_meta for t in (*same, *of_prior))
        and all(t.dtype == mean.dtype for t in same)
        and _is_in_range(terms.std)
        and not torch.compiler.is_compiling()
        and not in_transform()
        and not is_traced()
    )


def sample_and_kl(mean: Tensor, rho: Tensor, terms: KLTerms) -> tuple[Tensor, Tensor]:
    """Compute a sample w = μ + σ·ε, as :func:`~bnnify.draws.sample` does, and the KL in nats, summed to a scalar.

    The backward pass keeps ε, as for the sample alone. σ is computed once in each direction.
    """
    return _SampleAndKL.apply(mean, rho, noise_like(mean), terms)


def kl_of(mean: Tensor, rho: Tensor, terms: KLTerms) -> Tensor:
    """Compute the KL of :func:`sample_and_kl`, bit for bit, without a sample."""
    return _SampleAndKL.apply(mean, rho, None, terms)[1]


class _SampleAndKL(torch.autograd.Function):
    """w = μ + σ·ε and the summed KL. With the gradients g of w and G of the KL, and p = 1/std² and m of the prior:

    ∂/∂μ = g + G·p·(μ - m) and ∂/∂ρ = (g·ε + G·(p·σ - 1/σ))·sigmoid(ρ).
    """

    takes_waiting = True

    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, rho: Tensor, noise: Tensor | None, terms: KLTerms
    ) -> tuple[Tensor | None, Tensor]:
        cut, s, p = _CUT[rho.dtype], terms.std, _precision(terms.std, rho)
        # Asked only where the answer is at hand: a GPU would have to be waited for.
        low, high = (limit.item() for limit in rho.aminmax()) if rho.is_cpu else (-math.inf, math.inf)
        ctx.may_underflow, ctx.is_negative = low < cut, high < 0
        ctx.terms, ctx.precision = terms, p
        ctx.save_for_backward(mean, rho, noise)
        drawn, kls = None if noise is None else torch.empty_like(mean), []
        # The constant joins each term before the sum, inside the logarithm: at the optimum the terms cancel.
        factor = math.exp(-terms.constant) / (1.0 if s is None else s)
        for mu, r, eps, w, m in _blocks(mean, rho, noise, drawn, terms.mean):
            sigma = std(r)
            if w is not None:
                torch.addcmul(mu, sigma, eps, out=w)
            sigma.mul_(factor)
            if ctx.may_underflow:
                sigma.clamp_(min=factor * math.exp(cut))
            negative_kl = sigma.log()
            if ctx.may_underflow:
                negative_kl += (r - cut).clamp_(max=0.0)  # there log σ is ρ
            if s is not None:
                negative_kl.addcmul_(sigma, sigma, value=-0.5 * math.exp(2 * terms.constant))
            kls.append(-negative_kl.sum())
            if s is not None:  # what the distance adds cancels nothing, and can be summed by itself
                kls.append(0.5 * p * torch.linalg.vector_norm(_distance(mu, m, out=sigma)).square())
        return drawn, functools.reduce(torch.add, kls)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, G: Tensor) -> tuple[Tensor | None, ...]:
        mean, rho, noise = ctx.saved_tensors
        g = with_waiting(ctx, g)
        if torch.is_grad_enabled() or is_batched(g, G):
            return *_plain_backward(mean, rho, noise, ctx.terms, g, G), None, None
        p, prior_mean = ctx.precision, ctx.terms.mean
        if g is None or noise is None:  # of the KL alone
            g, noise = torch.zeros_like(mean), torch.zeros_like(mean)
        if g.layout is not torch.strided:  # of a sparse embedding
            g = g.to_dense()
        grad_mean, grad_rho = g, None
        if ctx.needs_input_grad[0] and ctx.terms.std is not None:
            grad_mean = torch.empty_like(mean)
            for out, dw, mu, m in _blocks(grad_mean, g, mean, prior_mean):
                torch.addcmul(dw, _distance(mu, m), G * p, out=out)
        if ctx.needs_input_grad[1]:
            # Fresh memory is dear, and the noise has served unless this may run again.
            grad_rho = noise.clone() if keeps_graph() else noise
            for out, dw, r in _blocks(grad_rho, g, rho):
                if ctx.may_underflow:
                    r = r.clamp(min=_CUT[rho.dtype])
                slope = r.sigmoid()
                # σ = -log(1 - sigmoid(ρ)) is cheaper, and precise where the sigmoid is not near 1.
                sigma = slope.neg().log1p_().neg_() if ctx.is_negative else std(r)
                out.mul_(dw).addcmul_(sigma, G * p).addcdiv_(-G, sigma).mul_(slope)
        return grad_mean, grad_rho, None, None


_BLOCK = 2**18
"""Elements that are worked on at a time: few enough for their intermediate results to stay in the cache."""


def _blocks(whole: Tensor, *others: Tensor | float | None) -> Iterator[Any]:
    """Split all the tensors, which have one shape, into pieces; repeat anything else."""
    tensors = [each for each in (whole, *others) if isinstance(each, Tensor)]
    if whole.numel() <= _BLOCK or not (whole.is_cpu and all(tensor.is_contiguous() for tensor in tensors)):
        return iter([(whole, *others)])
    count = math.ceil(whole.numel() / _BLOCK)
    pieces = [t.view(-1).split(_BLOCK) if isinstance(t, Tensor) else [t] * count for t in (whole, *others)]
    return zip(*pieces, strict=True)


def _distance(mean: Tensor, prior_mean: Tensor | float, out: Tensor | None = None) -> Tensor:
    is_zero = isinstance(prior_mean, float) and prior_mean == 0
    return mean if is_zero else torch.sub(mean, prior_mean, out=out)


def _plain_backward(
    mean: Tensor, rho: Tensor, noise: Tensor | None, terms: KLTerms, g: Tensor | None, G: Tensor
) -> list[Tensor | None]:
    """Compute the gradients with operations that autograd and ``vmap`` know, for second derivatives or many at once."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        outputs, grads = [terms.kl(Posterior(mean, rho, None, None)).sum()], [G]
        if g is not None and noise is not None:
            outputs, grads = [*outputs, sample(mean, rho, noise)], [*grads, g]
    needed = [each for each in (mean, rho) if each.requires_grad]
    derivatives = torch.autograd.grad(outputs, needed, grads, create_graph=create_graph, allow_unused=True)
    found = dict(zip(needed, derivatives, strict=True))
    return [found.get(mean), found.get(rho)]


def _is_in_range(std: Tensor | float | None) -> bool:
    """Tell whether float32 holds std² and 1/std²; of a tensor, which a GPU may have, :func:`_precision` sees to it."""
    return std is None or isinstance(std, Tensor) or (std > 0 and abs(math.log(std)) <= 25)


def _precision(std: Tensor | float | None, rho: Tensor) -> Any:
    """1/std², zero without a std; as large as float32 can hold it where it is larger."""
    if isinstance(std, Tensor):
        return std.double().pow(-2).clamp(max=1e36).to(rho.dtype)
    return 0.0 if std is None else 1 / std**2
