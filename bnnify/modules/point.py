"""The point posterior: all of it at the mean, so that training finds the maximum a posteriori."""

__all__ = ["Point"]

from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributions.prior import Posterior, Prior
from .mean_field import check_kl, state_for_prior
from .posterior import Parameter, PosteriorFamily


@dataclass(frozen=True)
class Point(PosteriorFamily):
    """w = μ, without noise and with nothing beside the mean; ``-log p(μ)`` takes the place of the KL."""

    has_noise = False

    def check_prior(self, prior: Prior) -> None:
        one = torch.ones(1, device="cpu")
        # Which may have no density, or one without a maximum.
        prior.penalty(Posterior(one, None, one, 1.0, prior_std=one))

    def start(self, mean: Tensor, std: Tensor) -> dict[str, Tensor]:
        return {}

    def noise(self, parameter: Parameter, generator: torch.Generator | None = None) -> Tensor:
        return parameter.mean.new_empty(0)

    def sample(self, parameter: Parameter, noise: Tensor | None = None) -> Tensor:
        return parameter.mean

    def kl(self, parameter: Parameter) -> Tensor:
        return check_kl(parameter, parameter.prior.penalty(state_for_prior(parameter, None))).sum()
