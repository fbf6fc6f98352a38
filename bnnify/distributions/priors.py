"""The priors: Gaussian, centred on the pretrained weights, Laplace, and a mixture of two scales."""

__all__ = ["LEARNED", "Gaussian", "Laplace", "Pretrained", "ScaleMixture"]

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ..errors import ConversionError, check_positive
from .densities import MeanAbsolute, MixtureLogProb, gaussian_log_prob, log
from .gaussian import at_least_float32, log_std, std
from .prior import KLTerms, MonteCarloPrior, Posterior, Prior

LEARNED: Literal["learned"] = "learned"
"""Given as the scale of a prior: each tensor has a scale of its own, always the one that makes its KL the smallest."""


@dataclass(frozen=True, kw_only=True)
class Gaussian(Prior):
    """p(w) = N(mean, std²), the same for every weight.

    Args:
        mean: Default: ``0.0``.
        std: The standard deviation (not the variance), or ``"learned"``: for each tensor the one that makes its KL the
            smallest, √mean(σ² + (μ - mean)²), which follows the posterior as it is trained (empirical Bayes: it
            maximises the ELBO). Default: ``1.0``.
    """

    mean: float = 0.0
    std: float | Literal["learned"] = 1.0
    needs_initial_std = False

    def __post_init__(self) -> None:
        _check_finite("Gaussian(mean)", self.mean)
        _check_scale("Gaussian(std)", self.std)

    def kl(self, posterior: Posterior) -> Tensor:
        return _gaussian_kl(posterior, self.mean, self.std)

    def terms(self, posterior: Posterior) -> KLTerms | None:
        return None if isinstance(self.std, str) else KLTerms(-0.5, self.mean, self.std)

    def log_prob(self, weights: Tensor) -> Tensor:
        return gaussian_log_prob(weights - self.mean, _fixed(self, self.std))


@dataclass(frozen=True, kw_only=True)
class Pretrained(Prior):
    """p(w) = N(w₀, s²) centred on the pretrained weights w₀ (the MOPED prior).

    Args:
        std: s, the same for every weight, or ``"learned"`` as for :class:`Gaussian`. Default: ``None``, which gives
            each tensor ``scale`` times the rms of the σ its posterior starts with, so that prior and posterior live on
            the same scale and a fresh conversion with a uniform σ has a KL of zero; or ten times the rms of its weights
            if the model's last layer looks untrained and nobody gave this prior, so that training can move them.
        scale: The factor used when ``std`` is None. Default: ``1.0``.

    References:
        Krishnan et al. 2020, "Specifying Weight Priors in Bayesian Deep Neural Networks with Empirical Bayes", eq. 6.
    """

    std: float | Literal["learned"] | None = None
    scale: float = 1.0
    centred = True

    def __post_init__(self) -> None:
        if self.std is not None:
            _check_scale("Pretrained(std)", self.std)
        check_positive("Pretrained(scale)", self.scale)

    def kl(self, posterior: Posterior) -> Tensor:
        return _gaussian_kl(posterior, at_least_float32(_centre(posterior)), self._std(posterior))

    def terms(self, posterior: Posterior) -> KLTerms | None:
        s = self._std(posterior)
        # As it stands: in half precision, which is not computed this way, widening it would be a copy for nothing.
        return None if isinstance(s, str) else KLTerms(-0.5, _centre(posterior), s)

    def penalty(self, posterior: Posterior) -> Tensor:
        distance = posterior.wide_mean - at_least_float32(_centre(posterior))
        return -gaussian_log_prob(distance, _fixed(self, self._std(posterior)))

    @property
    def needs_initial_std(self) -> bool:
        return self.std is None

    @property
    def relative_std(self) -> float:
        return self.scale

    def _std(self, posterior: Posterior) -> Tensor | float | Literal["learned"]:
        if self.std is not None:
            return self.std
        hint = "Let `needs_initial_std` be True in the class of the prior, or give it a std."
        return self.scale * posterior.required("initial_std", hint)


def _centre(posterior: Posterior) -> Tensor:
    return posterior.required("prior_mean", "Set `centred = True` in the class of the prior.")


@dataclass(frozen=True, kw_only=True)
class Laplace(Prior):
    """``p(w) = exp(-|w - mean| / scale) / (2·scale)``, the same for every weight; its KL has a closed form.

    Args:
        mean: Default: ``0.0``.
        scale: b, the mean absolute deviation; the standard deviation is √2·b. ``"learned"`` gives each tensor the one
            that makes its KL the smallest, the mean of E|w - mean|. Default: ``1.0``.
    """

    mean: float = 0.0
    scale: float | Literal["learned"] = 1.0
    needs_initial_std = False

    def __post_init__(self) -> None:
        _check_finite("Laplace(mean)", self.mean)
        _check_scale("Laplace(scale)", self.scale)

    def kl(self, posterior: Posterior) -> Tensor:
        distance = posterior.wide_mean - self.mean
        rho = posterior.wide_rho
        absolute = MeanAbsolute.apply(distance, std(rho))
        scale = posterior.average(absolute) if self.scale == LEARNED else self.scale
        return absolute / scale - log_std(rho) + (log(2 * scale) - 0.5 * math.log(2 * math.pi * math.e))

    def log_prob(self, weights: Tensor) -> Tensor:
        scale = _fixed(self, self.scale)
        return -(weights - self.mean).abs() / scale - math.log(2 * scale)


@dataclass(frozen=True, kw_only=True)
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
        first, second = (self.std1, self.pi), (self.std2, 1 - self.pi)
        return MixtureLogProb.apply(weights, *((first, second) if self.std1 >= self.std2 else (second, first)))


def _gaussian_kl(
    posterior: Posterior, prior_mean: Tensor | float, prior_std: Tensor | float | Literal["learned"]
) -> Tensor:
    """KL(N(μ, σ²) ‖ N(m, s²)) = log(s/σ) + (σ² + (μ - m)²)/(2s²) - 1/2 of each weight, in nats."""
    if isinstance(prior_std, str):
        distance = posterior.wide_mean - prior_mean
        prior_std = posterior.average(std(posterior.wide_rho).square() + distance.square()).sqrt()
    return KLTerms(-0.5, prior_mean, prior_std).kl(posterior)


def _fixed(prior: Prior, scale: Tensor | float | Literal["learned"]) -> Any:
    """Return the scale of a prior whose density is asked for, which has to be a number.

    Raises:
        ConversionError: It is learned.
    """
    if isinstance(scale, str):
        raise ConversionError(
            f"{prior} with a point posterior has no best scale: the smaller the weights, the better. Give it a number."
        )
    return scale


def _check_finite(name: str, value: object) -> None:
    if not (isinstance(value, (int, float)) and math.isfinite(value)):
        raise ConversionError(f"{name} must be finite, not {value!r}.")


def _check_scale(name: str, value: object) -> None:
    if value != LEARNED:
        check_positive(name, value)
