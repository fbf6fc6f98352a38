"""Priors over the weights; each knows its KL divergence from a mean-field Gaussian posterior."""

__all__ = ["Gaussian", "Posterior", "Pretrained", "Prior"]

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .errors import ConversionError
from .posterior import at_least_float32, check_positive, log_std, std


class Posterior(NamedTuple):
    """What a prior may look at to compute its KL: one Bayesian parameter as it is now.

    Attributes:
        mean: μ, of the weight's shape.
        rho: ρ, of the weight's shape.
        prior_mean: The pretrained weights, of the weight's shape, for a prior that is ``centred``; None otherwise.
        initial_std: The root mean square of the σ that the posterior had when it was converted.
    """

    mean: Tensor
    rho: Tensor
    prior_mean: Tensor | None
    initial_std: float


class Prior(ABC):
    """A distribution p(w), independent over weights. A prior of your own needs one method, :meth:`kl`."""

    centred: bool = False
    """Whether each parameter under this prior keeps its pretrained value beside it, as ``*_prior_mean``."""

    @abstractmethod
    def kl(self, posterior: Posterior) -> Tensor:
        """KL(q‖p) in nats, summed over the elements of the parameter: a scalar in float32 or better."""


@dataclass(frozen=True)
class Gaussian(Prior):
    """p(w) = N(mean, std²), the same for every weight.

    Args:
        mean: Default: ``0.0``.
        std: The standard deviation (not the variance). Default: ``1.0``.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not (isinstance(self.mean, (int, float)) and math.isfinite(self.mean)):
            raise ConversionError(f"Gaussian(mean) must be finite, not {self.mean!r}.")
        check_positive("Gaussian(std)", self.std)

    def kl(self, posterior: Posterior) -> Tensor:
        return gaussian_kl(posterior.mean, posterior.rho, self.mean, self.std)


@dataclass(frozen=True)
class Pretrained(Prior):
    """p(w) = N(w₀, s²) centred on the pretrained weights w₀ (the MOPED prior).

    Args:
        std: s, the same for every weight. Default: ``None``, which gives each tensor ``scale`` times the rms of the σ
            its posterior starts with, so that prior and posterior live on the same scale and a fresh conversion with a
            uniform σ has a KL of zero.
        scale: The factor used when ``std`` is None. Default: ``1.0``.

    References:
        Krishnan et al. 2020, "Specifying Weight Priors in Bayesian Deep Neural Networks with Empirical Bayes", eq. 6.
    """

    std: float | None = None
    scale: float = 1.0
    centred = True

    def __post_init__(self) -> None:
        if self.std is not None:
            check_positive("Pretrained(std)", self.std)
        check_positive("Pretrained(scale)", self.scale)

    def kl(self, posterior: Posterior) -> Tensor:
        assert posterior.prior_mean is not None  # `centred` promised it
        std = self.scale * posterior.initial_std if self.std is None else self.std
        return gaussian_kl(posterior.mean, posterior.rho, posterior.prior_mean, std)


def gaussian_kl(mean: Tensor, rho: Tensor, prior_mean: Tensor | float, prior_std: float) -> Tensor:
    """KL(N(μ, σ²) ‖ N(m, s²)) = Σ log(s/σ) + (σ² + (μ - m)²)/(2s²) - 1/2, in nats, summed over the elements."""
    mean, wide_rho = at_least_float32(mean), at_least_float32(rho)
    if isinstance(prior_mean, Tensor):
        prior_mean = at_least_float32(prior_mean)
    # Divided before they are squared: the square of a small std is zero in float32.
    squares = (std(wide_rho) / prior_std).square() + ((mean - prior_mean) / prior_std).square()
    # The constants join each term before the sum: at the optimum the terms cancel, and their separate sums would not.
    terms = 0.5 * squares - log_std(wide_rho) + (math.log(prior_std) - 0.5)
    return terms.sum()


def as_prior(prior: object) -> Prior:
    """Check what a user gave as ``prior``.

    Raises:
        ConversionError: It is not a :class:`Prior`.
    """
    if isinstance(prior, Prior):
        return prior
    raise ConversionError(
        f"Unknown prior {prior!r}: give an instance of a Prior, for example Gaussian(std=0.1) or Pretrained()."
    )
