"""The mean-field Gaussian posterior: independent weights w ~ N(μ, softplus(ρ)²), with ρ beside the mean."""

__all__ = ["MeanField", "check_kl", "state_for_prior"]

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from ..distributions.gaussian import dtype_of_rho, is_pruned, rho_from_std
from ..distributions.prior import KLTerms, MonteCarloPrior, Posterior
from ..draws.companions import RHO, from_buffer
from ..draws.noise import noise_like
from ..draws.sample import sample
from ..draws.sample_and_kl import can_fuse, kl_of, sample_and_kl
from ..errors import ArgumentTypeError, ConversionError, describe
from .posterior import Parameter, PosteriorFamily


@final
@dataclass(frozen=True)
class MeanField(PosteriorFamily):
    """w ~ N(μ, σ²) with σ = softplus(ρ), independently for each weight; ρ stands beside the mean as ``*_rho``.

    ρ is in float32 at least, also beside weights in half precision.

    References:
        Blundell et al. 2015, "Weight Uncertainty in Neural Networks", section 3.2.
    """

    companions = (RHO,)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # Fast predictions, pruning, tuning and the estimators know this very distribution, and no variation of it.
        raise ArgumentTypeError(f"{cls.__name__} must derive from PosteriorFamily: a MeanField is always N(μ, σ²).")

    def start(self, mean: Tensor, std: Tensor) -> dict[str, Tensor]:
        return {RHO: rho_from_std(std.to(dtype_of_rho(mean.dtype))).expand_as(mean)}

    def fits(self, mean: Tensor, *companions: Tensor) -> bool:
        return companions[0].shape == mean.shape

    def noise(self, parameter: Parameter, generator: torch.Generator | None = None) -> Tensor:
        return noise_like(parameter.mean, generator)

    def sample(self, parameter: Parameter, noise: Tensor | None = None) -> Tensor:
        return sample(parameter.kept_mean, parameter.companion(RHO), noise)

    def kl(self, parameter: Parameter) -> Tensor:
        prior, rho, kept = parameter.prior, parameter.companion(RHO), None
        drawn = parameter.drawn() if prior.needs_sample or isinstance(prior, MonteCarloPrior) else None
        terms = _fused_terms(parameter, rho)
        if terms is not None:
            return _with_density(parameter, kl_of(parameter.mean, rho, terms), drawn)
        if parameter.has_pruned:
            kept = ~is_pruned(rho)
            rho = torch.where(kept, rho, 0.0)  # what is discarded must be finite, for the sake of the gradient
        kl = check_kl(parameter, prior.kl(state_for_prior(parameter, rho, drawn, kept)))
        return (kl if kept is None else torch.where(kept, kl, 0.0)).sum()

    def sample_and_kl(self, parameter: Parameter) -> tuple[Tensor, Tensor] | None:
        rho = parameter.companion(RHO)
        terms = _fused_terms(parameter, rho)
        if terms is None:
            return None
        drawn, kl = sample_and_kl(parameter.mean, rho, terms)
        return drawn, _with_density(parameter, kl, drawn)


def _fused_terms(parameter: Parameter, rho: Tensor) -> KLTerms | None:
    """Return the terms of the KL, if one function of autograd can make it of them."""
    if parameter.has_pruned:
        return None
    terms = parameter.prior.fast_terms(state_for_prior(parameter, rho))
    return terms if terms is not None and can_fuse(parameter.mean, rho, terms) else None


def _with_density(parameter: Parameter, kl: Tensor, drawn: Tensor | None) -> Tensor:
    """Add to the KL the part that a prior known by its density takes from the sample."""
    if drawn is None or not isinstance(parameter.prior, MonteCarloPrior):
        return kl
    return kl - check_kl(parameter, parameter.prior.log_prob(drawn)).sum()


def state_for_prior(
    parameter: Parameter, rho: Tensor | None, drawn: Tensor | None = None, kept: Tensor | None = None
) -> Posterior:
    """Put the posterior of ``parameter`` into the form in which a prior looks at it."""
    # Nothing trains the prior, whatever flag it bears as a DTensor.
    prior_mean, prior_std = (
        tensor.detach() if tensor is not None and tensor.requires_grad else tensor
        for tensor in (parameter.prior_mean, parameter.prior_std)
    )
    initial_std = parameter.initial_std
    return Posterior(
        parameter.mean,
        rho,
        prior_mean,
        None if initial_std is None else from_buffer(initial_std),
        drawn,
        kept,
        prior_std,
    )


def check_kl(parameter: Parameter, kl: Tensor) -> Tensor:
    """Return the KL of each weight that a prior has given, checked.

    Raises:
        ConversionError: It is not one number for each weight.
    """
    if not isinstance(kl, Tensor) or kl.shape != parameter.mean.shape:
        raise ConversionError(
            f"The prior {parameter.prior} gives `{parameter.name}`, of shape {tuple(parameter.mean.shape)}, not one KL "
            f"for each weight but {describe(kl)}. Return that of each weight, without a sum."
        )
    return kl
