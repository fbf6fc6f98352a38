"""Priors: distributions of the weights that know their KL divergence from a mean-field Gaussian posterior."""

__all__ = ["KLTerms", "MonteCarloPrior", "Posterior", "Prior", "as_prior"]

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConversionError
from .gaussian import at_least_float32, log_std, std


class Posterior(NamedTuple):
    """One Bayesian parameter as it is now, in the form in which a prior looks at it to compute its KL.

    Attributes:
        mean: μ, of the weight's shape.
        rho: ρ, of the weight's shape; None where the posterior is a point.
        prior_mean: The pretrained weights, of the weight's shape, for a prior that is ``centred``; None otherwise.
        initial_std: The root mean square of the σ that the posterior had when it was converted, a scalar, for a prior
            with ``needs_initial_std``; None otherwise.
        sample: For a prior with ``needs_sample``, w ~ q of the weight's shape: that of the draw in effect, or a fresh
            one outside of a draw; None otherwise.
        kept: True for each weight that counts, of the weight's shape; None for all of them. The KL of the others, which
            were pruned, is discarded.
        prior_std: The standard deviation of the prior of each weight, of the weight's shape, for a prior that is
            ``elementwise``; None otherwise.
    """

    mean: Tensor
    rho: Tensor | None
    prior_mean: Tensor | None
    initial_std: Tensor | float | None
    sample: Tensor | None = None
    kept: Tensor | None = None
    prior_std: Tensor | None = None

    @property
    def wide_mean(self) -> Tensor:
        """μ in float32 or better."""
        return at_least_float32(self.mean)

    @property
    def wide_rho(self) -> Tensor:
        """ρ in float32 or better.

        Raises:
            ConversionError: The posterior is a point, which has none.
        """
        hint = "A point has no ρ: give the prior a method log_prob(weights) instead, or penalty(posterior) without ρ."
        return at_least_float32(self.required("rho", hint))

    def required(self, attribute: str, hint: str) -> Any:
        """Return an attribute that may be None.

        Raises:
            ConversionError: It is None; ``hint`` is a sentence on what to do.
        """
        value = getattr(self, attribute)
        if value is None:
            raise ConversionError(f"A prior looked at `{attribute}`, which this posterior does not have. {hint}")
        return value

    def average(self, values: Tensor) -> Tensor:
        """Average ``values``, one for each weight, over the weights that count; positive values stay positive."""
        count = self.mean.numel() if self.kept is None else self.kept.sum().clamp(min=1)
        values = values if self.kept is None else torch.where(self.kept, values, 0.0)
        return (values.sum() / count).clamp(min=torch.finfo(values.dtype).tiny)


@dataclass(frozen=True)
class KLTerms:
    """A KL of the form ``log(std / σ) + constant + (σ² + (μ - mean)²) / (2·std²)``, in nats, of each weight.

    Attributes:
        constant: Minus a half for a Gaussian prior.
        mean: The prior's mean, one for all weights or of their shape.
        std: The prior's standard deviation, one for all weights or of their shape. None where the prior looks at the
            sample instead, and the KL is ``-log σ + constant``.
    """

    constant: float
    mean: Tensor | float = 0.0
    std: Tensor | float | None = None

    def kl(self, posterior: Posterior) -> Tensor:
        """log(std / σ) + constant + (σ² + (μ - mean)²) / (2·std²), of the weights' shape, in float32 or better."""
        mean, rho = posterior.wide_mean, posterior.wide_rho
        if self.std is None:
            return self.constant - log_std(rho)
        log_scale = self.std.log() if isinstance(self.std, Tensor) else math.log(self.std)
        # Divided before they are squared: the square of a small std is zero in float32.
        squares = (std(rho) / self.std).square() + ((mean - self.mean) / self.std).square()
        # The constant joins each term before the sum: at the optimum the terms cancel, and their sums would not.
        return 0.5 * squares + (log_scale + self.constant - log_std(rho))


class Prior(ABC):
    """A distribution p(w), independent over weights. A prior of your own needs one method, :meth:`kl`.

    For a point posterior it needs another one, :meth:`log_prob`.
    """

    centred: bool = False
    """True if each parameter keeps its pretrained value beside it, as ``*_prior_mean``."""

    elementwise: bool = False
    """True if each parameter keeps the standard deviations of its prior beside it, as ``*_prior_std``."""

    needs_sample: bool = False
    """True if the KL is estimated from a sample of the posterior; it then differs from draw to draw."""

    @property
    def needs_initial_std(self) -> bool:
        """True if the KL needs the σ that the posterior started with, which is then kept as ``*_initial_std``."""
        return True

    @property
    def relative_std(self) -> float:
        """How wide the prior is in units of ``*_initial_std``."""
        return 1.0

    def beside(self, weight: Tensor) -> dict[str, Tensor]:
        """The tensors that a prior keeps beside ``weight``, of its shape, by their names in :class:`Posterior`.

        Default: the pretrained weights, of a prior that is ``centred``.
        """
        return {"prior_mean": weight} if self.centred else {}

    @property
    def kept(self) -> "Prior":
        """What the settings of a parameter keep of it. Default: itself."""
        return self

    @property
    def posterior_std(self) -> Any:
        """The rule for σ beside this prior where nobody gives one. Default: None, that of every other."""
        return None

    @abstractmethod
    def kl(self, posterior: Posterior) -> Tensor:
        """KL(q‖p) of each weight, in nats: of the weight's shape, in float32 or better."""

    def terms(self, posterior: Posterior) -> KLTerms | None:
        """Return the closed-form part of :meth:`kl` as coefficients, which select a faster way to compute it.

        They must agree with :meth:`kl` for each weight. Default: None, for a KL of another form.
        """
        return None

    def fast_terms(self, posterior: Posterior) -> KLTerms | None:
        """Return :meth:`terms`, or None if a subclass overrides :meth:`kl` alone, which they need not agree with."""
        for cls in type(self).__mro__:
            if "kl" in vars(cls) or "terms" in vars(cls):
                return self.terms(posterior) if "kl" in vars(cls) and "terms" in vars(cls) else None
        return None

    def log_prob(self, weights: Tensor) -> Tensor:
        """log p(w) of each weight, in nats, of the weights' shape."""
        raise ConversionError(
            f"{self} does not know its density, which posterior=Point() needs: give it a method "
            "log_prob(weights), or take another prior."
        )

    def penalty(self, posterior: Posterior) -> Tensor:
        """``-log p(μ)`` of each weight, in nats: the term in place of the KL of a point posterior."""
        return -self.log_prob(posterior.wide_mean)


class MonteCarloPrior(Prior):
    """A prior known by its density alone. A prior of your own of this kind needs one method, :meth:`log_prob`.

    The KL is estimated from the very sample that the forward used, as KL(q‖p) = -H(q) - E_q[log p(w)], of which the
    entropy H is exact: unbiased, with unbiased gradients, and equal to Blundell's log q(w) - log p(w) on average.

    References:
        Blundell et al. 2015, "Weight Uncertainty in Neural Networks", eq. 2.
    """

    needs_sample = True
    needs_initial_std = False

    @abstractmethod
    def log_prob(self, weights: Tensor) -> Tensor:
        """log p(w) of each weight, in nats, of the weights' shape."""

    def kl(self, posterior: Posterior) -> Tensor:
        drawn = posterior.required("sample", "Set `needs_sample = True` in the class of the prior.")
        return self.terms(posterior).kl(posterior) - self.log_prob(at_least_float32(drawn))

    def terms(self, posterior: Posterior) -> KLTerms:
        return KLTerms(constant=-0.5 * math.log(2 * math.pi * math.e))  # the entropy of N(0, 1)


def as_prior(prior: object) -> Prior:
    """Return ``prior``, as a user gave it.

    Raises:
        ConversionError: It is not a :class:`Prior`.
    """
    if isinstance(prior, Prior):
        return prior
    raise ConversionError(
        f"Unknown prior {prior!r}: give an instance of a Prior, for example Gaussian(std=0.1) or Pretrained()."
    )
