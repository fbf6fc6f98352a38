"""The table of likelihoods, which predictions, losses and what fits σ to data share."""

__all__ = [
    "BinaryLogits",
    "GaussianPair",
    "LikelihoodLike",
    "Logits",
    "OfFunction",
    "Probabilities",
    "Values",
    "as_likelihood",
    "as_pair",
]

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Normal

from ..distributions.gaussian import at_least_float32
from ..errors import ArgumentError, ArgumentTypeError, describe
from .classes import check_logits, check_probabilities, dimension_of_classes
from .likelihood import Likelihood, has_values


@runtime_checkable
class Criterion(Protocol):
    """A loss that is the negative logarithm of a likelihood, and tells which."""

    def likelihood(self, class_dim: int | None = None) -> Likelihood: ...


LikelihoodLike: TypeAlias = str | Callable[[Any], Distribution] | Criterion
"""The name of a likelihood, a module of bnnify's NLLs, or a function from an output to a ``torch.distributions``
object.
"""


class Values(Likelihood):
    """Real or complex numbers, averaged as they are; of yes and no (bool) the share of yes."""

    name = "values"

    def _fitting(self, value: Tensor) -> Tensor:
        if value.is_complex():
            return value
        if value.dtype == torch.bool:
            return value.float()
        if not value.is_floating_point():
            raise ArgumentTypeError(
                f"The model returned integers ({value.dtype}), and an average of decisions, such as class numbers, "
                "means nothing. Let it return what it decides from, such as logits; or, if these are quantities, pass "
                "output=lambda out: out.float()."
            )
        return value


class _Classes(Likelihood):
    has_classes = is_discrete = True

    def entropy(self, mean: Tensor) -> Tensor:
        return torch.special.entr(at_least_float32(mean)).sum(self._dim)

    @property
    def _dim(self) -> int:
        return -1 if self.class_dim is None else self.class_dim


class Logits(_Classes):
    """Unnormalised log probabilities of classes along ``class_dim``."""

    name = "logits"

    def check(self, parts: tuple[Tensor, ...], rows: int | None = None) -> None:
        check_logits(parts[0], dimension_of_classes(parts[0], self.class_dim, rows), look=has_values(parts[0]))

    def mean(self, parts: tuple[Tensor, ...]) -> Tensor:
        return at_least_float32(parts[0]).softmax(self._dim)

    def energy(self, parts: tuple[Tensor, ...]) -> Tensor:
        return -at_least_float32(parts[0]).logsumexp(self._dim)

    def _distribution(self, *parts: Tensor) -> Distribution:
        return Categorical(logits=parts[0].movedim(self._dim, -1), validate_args=False)


class Probabilities(_Classes):
    """Probabilities of classes along ``class_dim``."""

    name = "probabilities"

    def check(self, parts: tuple[Tensor, ...], rows: int | None = None) -> None:
        dim = dimension_of_classes(parts[0], self.class_dim, rows)
        if has_values(parts[0]):
            check_probabilities(parts[0], dim)

    def check_average(self, mean: Tensor) -> None:
        self.check((mean,))

    def _distribution(self, *parts: Tensor) -> Distribution:
        return Categorical(probs=parts[0].movedim(self._dim, -1), validate_args=False)


class BinaryLogits(Likelihood):
    """Independent logits of yes/no questions."""

    name = "binary_logits"
    is_discrete = True

    def mean(self, parts: tuple[Tensor, ...]) -> Tensor:
        return at_least_float32(parts[0]).sigmoid()

    def entropy(self, mean: Tensor) -> Tensor:
        return torch.special.entr(mean) + torch.special.entr(1 - mean)

    def _distribution(self, *parts: Tensor) -> Distribution:
        return Bernoulli(logits=parts[0], validate_args=False)


class GaussianPair(Likelihood):
    """A pair (mean, variance) of a regression that predicts its own noise."""

    name = "gaussian"

    def parts(self, found: Any) -> tuple[Tensor, ...]:
        mean, variance = as_pair(found, "likelihood='gaussian'")
        if mean.shape != variance.shape:
            raise ArgumentError(
                f"likelihood='gaussian' needs a mean and a variance of the same shape; they have {tuple(mean.shape)} "
                f"and {tuple(variance.shape)}. Make them alike with output=."
            )
        return self._part(mean), self._part(variance)

    def check(self, parts: tuple[Tensor, ...], rows: int | None = None) -> None:
        variance = parts[1]
        if has_values(variance) and (variance < 0).any():
            raise ArgumentError(
                f"likelihood='gaussian' needs (mean, variance), and the second of the pair is negative in places (down "
                f"to {variance.min().item():.3g}). If it is the logarithm of the variance, pass output=lambda out: "
                "(out[0], out[1].exp())."
            )

    def variance(self, parts: tuple[Tensor, ...]) -> Tensor:
        # One that is negative in this network alone must not hide in the average.
        return parts[1].where(parts[1] >= 0, torch.nan)

    def _distribution(self, *parts: Tensor) -> Distribution:
        return Normal(parts[0], parts[1].sqrt(), validate_args=False)


class OfFunction(Likelihood):
    """The distribution that a function makes of the output, such as ``lambda mean: Normal(mean, 0.1)``."""

    name = "a function"

    def __init__(self, function: Callable[[Any], Distribution], class_dim: int | None = None) -> None:
        super().__init__(class_dim)
        self._function = function

    def parts(self, found: Any) -> tuple[Tensor, ...]:
        distribution = self.distribution(found)
        if isinstance(distribution, Categorical):  # which has no mean
            raise ArgumentError(
                "Of classes pass likelihood='logits' or 'probabilities', and output= for what has them."
            )
        return distribution.mean, distribution.variance

    def variance(self, parts: tuple[Tensor, ...]) -> Tensor:
        return parts[1]

    def distribution(self, found: Any, rows: int | None = None) -> Distribution:
        try:
            distribution = self._function(found)
        except TypeError as error:
            raise ArgumentTypeError(
                f"likelihood= must be a function of the output alone, and called with it raised: {error}. Of losses "
                "only bnnify's NLL modules tell what an output means, such as bnnify.GaussianNLL."
            ) from error
        if not isinstance(distribution, Distribution):
            raise ArgumentTypeError(
                "likelihood= must be a function of the output that returns a torch.distributions.Distribution, not "
                f"{describe(distribution)}."
            )
        return distribution


_LIKELIHOODS = {kind.name: kind for kind in (Values, Logits, Probabilities, BinaryLogits, GaussianPair)}


def as_likelihood(likelihood: LikelihoodLike, class_dim: int | None = None) -> Likelihood:
    """Look up the likelihood with this name, or take that of this NLL module or function.

    Raises:
        ArgumentError: The name is unknown, or ``class_dim`` is given for a likelihood without classes.
        ArgumentTypeError: ``class_dim`` is no integer.
    """
    if isinstance(likelihood, str) and likelihood in _LIKELIHOODS:
        return _LIKELIHOODS[likelihood](class_dim)
    if isinstance(likelihood, Criterion):
        return likelihood.likelihood(class_dim)
    if callable(likelihood):
        return OfFunction(likelihood, class_dim)
    raise ArgumentError(
        f"Unknown likelihood {likelihood!r}: known are {', '.join(map(repr, _LIKELIHOODS))}, the NLL modules of "
        "bnnify, such as bnnify.GaussianNLL(std=0.1), and a function of the output that returns a "
        "torch.distributions.Distribution."
    )


def as_pair(found: Any, wanted_by: str) -> tuple[Tensor, Tensor]:
    """Split the output of a model into mean and variance.

    Raises:
        ArgumentTypeError: It is no pair of tensors; ``wanted_by`` says who needs one.
    """
    if isinstance(found, (tuple, list)) and len(found) == 2 and all(isinstance(part, Tensor) for part in found):
        return found[0], found[1]
    raise ArgumentTypeError(
        f"{wanted_by} needs a pair of tensors (mean, variance), but got {type(found).__name__}. Make the pair of what "
        "the model returns: (out[..., 0], out[..., 1].exp()), in predict with output=lambda out: …"
    )
