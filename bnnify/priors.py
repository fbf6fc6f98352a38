"""Priors over the weights; each knows its KL divergence from a mean-field Gaussian posterior."""

__all__ = ["Gaussian", "Laplace", "MonteCarloPrior", "Posterior", "Pretrained", "Prior", "ScaleMixture"]

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
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
        sample: For a prior with ``needs_sample``, w ~ q of the weight's shape: that of the draw in effect, or a fresh
            one outside of a draw; None otherwise.
    """

    mean: Tensor
    rho: Tensor
    prior_mean: Tensor | None
    initial_std: float
    sample: Tensor | None = None


class Prior(ABC):
    """A distribution p(w), independent over weights. A prior of your own needs one method, :meth:`kl`."""

    centred: bool = False
    """Whether each parameter under this prior keeps its pretrained value beside it, as ``*_prior_mean``."""

    needs_sample: bool = False
    """Whether the KL is estimated from a sample of the posterior; then it differs from draw to draw."""

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
        _check_finite("Gaussian(mean)", self.mean)
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


@dataclass(frozen=True)
class Laplace(Prior):
    """``p(w) = exp(-|w - mean| / scale) / (2·scale)``, the same for every weight; its KL has a closed form.

    Args:
        mean: Default: ``0.0``.
        scale: b, the mean absolute deviation; the standard deviation is √2·b. Default: ``1.0``.
    """

    mean: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_finite("Laplace(mean)", self.mean)
        check_positive("Laplace(scale)", self.scale)

    def kl(self, posterior: Posterior) -> Tensor:
        distance = at_least_float32(posterior.mean) - self.mean
        rho = at_least_float32(posterior.rho)
        sigma = std(rho).clamp(min=torch.finfo(rho.dtype).tiny)
        # E|w - m| under q. Beyond 40 σ it is |μ - m|, and the clamp keeps infinities out of the gradient.
        ratio = (distance / sigma).clamp(-40, 40)
        spread = math.sqrt(2 / math.pi) * sigma * torch.exp(-0.5 * ratio.square())
        absolute = spread + distance * torch.erf(ratio / math.sqrt(2))
        return (absolute / self.scale - log_std(rho) + (math.log(2 * self.scale) - _GAUSSIAN_ENTROPY)).sum()


class MonteCarloPrior(Prior):
    """A prior known by its density alone. A prior of your own of this kind needs one method, :meth:`log_prob`.

    The KL is estimated from the very sample that the forward used, as KL(q‖p) = -H(q) - E_q[log p(w)], of which the
    entropy H is exact: unbiased, with unbiased gradients, and equal to Blundell's log q(w) - log p(w) on average.

    References:
        Blundell et al. 2015, "Weight Uncertainty in Neural Networks", eq. 2.
    """

    needs_sample = True

    @abstractmethod
    def log_prob(self, weights: Tensor) -> Tensor:
        """log p(w) of each weight, in nats, of the weights' shape."""

    def kl(self, posterior: Posterior) -> Tensor:
        assert posterior.sample is not None  # `needs_sample` promised it
        negative_entropy = -log_std(posterior.rho) - _GAUSSIAN_ENTROPY
        return (negative_entropy - self.log_prob(at_least_float32(posterior.sample))).sum()


@dataclass(frozen=True)
class ScaleMixture(MonteCarloPrior):
    """p(w) = pi·N(0, std1²) + (1 - pi)·N(0, std2²): a wide slab and a narrow spike; its KL is a Monte Carlo estimate.

    Args:
        pi: The share of the first component, between 0 and 1. Default: ``0.5``.
        std1: The standard deviation of the first component. Default: ``1.0``.
        std2: That of the second one, usually far smaller. Default: ``exp(-6)``.

    References:
        Blundell et al. 2015, "Weight Uncertainty in Neural Networks", eq. 7.
    """

    pi: float = 0.5
    std1: float = 1.0
    std2: float = math.exp(-6)

    def __post_init__(self) -> None:
        if not (isinstance(self.pi, (int, float)) and 0 < self.pi < 1):
            raise ConversionError(f"ScaleMixture(pi) must lie between 0 and 1, not {self.pi!r}.")
        check_positive("ScaleMixture(std1)", self.std1)
        check_positive("ScaleMixture(std2)", self.std2)

    def log_prob(self, weights: Tensor) -> Tensor:
        first = math.log(self.pi) + _gaussian_log_prob(weights, self.std1)
        second = math.log1p(-self.pi) + _gaussian_log_prob(weights, self.std2)
        return torch.logaddexp(first, second)


_GAUSSIAN_ENTROPY = 0.5 * math.log(2 * math.pi * math.e)
"""The entropy of N(0, 1); that of N(μ, σ²) has log σ more."""


def _gaussian_log_prob(weights: Tensor, std: float) -> Tensor:
    return -0.5 * (weights / std).square() - (math.log(std) + 0.5 * math.log(2 * math.pi))


def _check_finite(name: str, value: object) -> None:
    if not (isinstance(value, (int, float)) and math.isfinite(value)):
        raise ConversionError(f"{name} must be finite, not {value!r}.")


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
