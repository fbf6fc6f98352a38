"""The base of posteriors, which say what stands beside the mean and how a sample and its KL are made."""

__all__ = ["Parameter", "PosteriorFamily", "as_posterior"]

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ..distributions.prior import Prior
from ..errors import ConversionError


class Parameter(Protocol):
    """One parameter as its posterior sees it: a :class:`~bnnify.modules.BayesianParameter`."""

    @property
    def name(self) -> str: ...

    @property
    def mean(self) -> Tensor: ...

    @property
    def kept_mean(self) -> Tensor: ...

    @property
    def prior(self) -> Prior: ...

    @property
    def prior_mean(self) -> Tensor | None: ...

    @property
    def prior_std(self) -> Tensor | None: ...

    @property
    def initial_std(self) -> Tensor | None: ...

    @property
    def has_pruned(self) -> bool: ...

    def companion(self, ending: str) -> Tensor:
        """The parameter of the module whose name is this one's and ``ending``."""

    def drawn(self) -> Tensor:
        """The sample of the draw in effect, or else a fresh one."""


class PosteriorFamily(ABC):
    """A family of distributions q(w) of one parameter, around its value as the mean.

    A family of your own is a subclass in a file of its own; it takes its place as ``convert(model, posterior=...)``.
    """

    companions: ClassVar[tuple[str, ...]] = ()
    """The endings that the parameter's name has in the names of those that stand beside it."""

    has_noise: ClassVar[bool] = True
    """True if a sample differs from the mean."""

    def check_prior(self, prior: Prior) -> None:
        """Raise a ConversionError if this family cannot have that prior. Default: it can have any."""
        return None

    @abstractmethod
    def start(self, mean: Tensor, std: Tensor) -> dict[str, Tensor]:
        """The first value of each companion, by its ending; ``std`` is one σ for all weights or one for each.

        What is the same for all weights may be one number, expanded.
        """

    def fits(self, mean: Tensor, *companions: Tensor) -> bool:
        """Tell whether the companions have the shapes that this mean needs. Default: they have."""
        return True

    @abstractmethod
    def noise(self, parameter: Parameter, generator: torch.Generator | None = None) -> Tensor:
        """The standard normal numbers that one sample is made of; their negative makes the antithetic sample."""

    @abstractmethod
    def sample(self, parameter: Parameter, noise: Tensor | None = None) -> Tensor:
        """One reparameterized sample, of the mean's shape, from which gradients flow to the mean and the companions.

        It is made of ``noise``, as of :meth:`noise`. Default: fresh noise.
        """

    @abstractmethod
    def kl(self, parameter: Parameter) -> Tensor:
        """KL(q‖p) in nats, summed over the weights; a prior that needs a sample gets ``parameter.drawn()``."""

    def sample_and_kl(self, parameter: Parameter) -> tuple[Tensor, Tensor] | None:
        """One sample and the KL at it, faster than one after the other; None where there is no such way."""
        return None


def as_posterior(posterior: Any) -> PosteriorFamily:
    """Check what a user gave as ``posterior``.

    Raises:
        ConversionError: It is not a :class:`PosteriorFamily`.
    """
    if isinstance(posterior, PosteriorFamily):
        return posterior
    raise ConversionError(f"Unknown posterior {posterior!r}: give MeanField() or Point().")
