"""Likelihoods: what the output of a model means, each in one class, for predictions and for what fits σ to data."""

__all__ = ["Likelihood", "LikelihoodLike", "Probabilities", "as_likelihood", "as_pair", "has_values"]

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Normal

from ..checks import check_integer, describe
from ..distributions.gaussian import at_least_float32
from ..errors import ArgumentError, ArgumentTypeError
from ..torch_internals import in_transform
from .classes import check_logits, check_probabilities, dimension_of_classes

LikelihoodLike: TypeAlias = str | Callable[[Any], Distribution]
"""The name of a likelihood, or a function that makes a ``torch.distributions`` object of a model's output."""


class Likelihood:
    """p(y|x, w), given the output of a model: the base of all likelihoods.

    A new likelihood is a subclass that overrides what is different and stands in the table of :func:`as_likelihood`.

    Args:
        class_dim: The dimension of the classes, if it has classes. Default: the last one.
    """

    name: ClassVar[str]
    has_classes: ClassVar[bool] = False

    def __init__(self, class_dim: int | None = None) -> None:
        if class_dim is not None:
            check_integer("class_dim", class_dim)
            if not self.has_classes:
                raise ArgumentError(
                    f"class_dim={class_dim} is for likelihood='logits' and 'probabilities', and the likelihood here is "
                    f"{self.name!r}."
                )
        self.class_dim = class_dim

    def parts(self, found: Any) -> tuple[Tensor, ...]:
        """The tensors in the output of a model, dense and of a dtype that fits; the first one tells the mean.

        Raises:
            ArgumentTypeError: The output is something else.
        """
        return (self._part(_one_tensor(found, self.name)),)

    def check(self, parts: tuple[Tensor, ...], rows: int | None = None) -> None:
        """Raise an ArgumentError where shape or values cannot mean this; ``rows`` is the number of examples."""

    def check_average(self, mean: Tensor) -> None:
        """Raise an ArgumentError where the average of :meth:`mean` shows that an output did not mean this."""

    def mean(self, parts: tuple[Tensor, ...]) -> Tensor:
        """E[y|x, w], of the shape of the output: what is averaged over networks."""
        return parts[0]

    def variance(self, parts: tuple[Tensor, ...]) -> Tensor | None:
        """Var[y|x, w], the noise of the data, of the same shape; None where the output does not tell it."""
        return None

    def entropy(self, mean: Tensor) -> Tensor | None:
        """The entropy in nats of y with this mean; None if y is not discrete."""
        return None

    def distribution(self, found: Any, rows: int | None = None) -> Distribution:
        """p(y|x, w) from the chosen output of a model, which is checked, but for values that are no numbers.

        ``rows`` is the number of examples in the batch, as far as it is known.

        Raises:
            ArgumentError: The output cannot mean this, or the likelihood does not tell how probable a target is.
            ArgumentTypeError: The output is of another type.
        """
        parts = self.parts(found)
        self.check(parts, rows)
        return self._distribution(*map(at_least_float32, parts))

    def _distribution(self, *parts: Tensor) -> Distribution:
        raise ArgumentError(
            f"likelihood={self.name!r} does not tell how probable a target is. Pass 'gaussian' for a pair (mean, "
            "variance), or a function that makes a distribution, such as lambda mean: Normal(mean, 0.1)."
        )

    def _part(self, value: Tensor) -> Tensor:
        value = self._fitting(value)
        return value if value.layout in (torch.strided, torch.jagged) else value.to_dense()

    def _fitting(self, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            way_out = "a real part of it, such as out.abs()" if value.is_complex() else "what it decides from"
            raise ArgumentTypeError(
                f"likelihood={self.name!r} needs real floating-point numbers, and the model returned {value.dtype}. "
                f"Return {way_out}, or choose it with output=."
            )
        return value


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
    has_classes = True

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
        distribution = self._function(found)
        if not isinstance(distribution, Distribution):
            raise ArgumentTypeError(
                "likelihood= must be a function of the output that returns a torch.distributions.Distribution, not "
                f"{describe(distribution)}."
            )
        return distribution


_LIKELIHOODS = {kind.name: kind for kind in (Values, Logits, Probabilities, BinaryLogits, GaussianPair)}


def as_likelihood(likelihood: LikelihoodLike, class_dim: int | None = None) -> Likelihood:
    """The likelihood with this name, or of this function.

    Raises:
        ArgumentError: The name is unknown, or ``class_dim`` is given for a likelihood without classes.
        ArgumentTypeError: ``class_dim`` is no integer.
    """
    if isinstance(likelihood, str) and likelihood in _LIKELIHOODS:
        return _LIKELIHOODS[likelihood](class_dim)
    if callable(likelihood):
        return OfFunction(likelihood, class_dim)
    raise ArgumentError(
        f"Unknown likelihood {likelihood!r}: known are {', '.join(map(repr, _LIKELIHOODS))}, and a function of the "
        "output that returns a torch.distributions.Distribution."
    )


def has_values(value: Tensor) -> bool:
    """Tell whether the numbers in ``value`` can be looked at: not on the meta device, nor under ``torch.func``."""
    return not value.is_meta and not in_transform()


def as_pair(found: Any, wanted_by: str) -> tuple[Tensor, Tensor]:
    """Mean and variance in the output of a model.

    Raises:
        ArgumentTypeError: It is no pair of tensors; ``wanted_by`` says who needs one.
    """
    if isinstance(found, (tuple, list)) and len(found) == 2 and all(isinstance(part, Tensor) for part in found):
        return found[0], found[1]
    raise ArgumentTypeError(
        f"{wanted_by} needs a pair of tensors (mean, variance), but got {type(found).__name__}. Make the pair of what "
        "the model returns: (out[..., 0], out[..., 1].exp()), in predict with output=lambda out: …"
    )


def _one_tensor(found: Any, likelihood: str) -> Tensor:
    if isinstance(found, Tensor):
        return found
    keys = f" with the keys {list(found)}" if isinstance(found, Mapping) else ""
    raise ArgumentTypeError(
        f"likelihood={likelihood!r} needs a tensor, but the model returned {type(found).__name__}{keys}. "
        "Say which part of it with output=: a key, an attribute, an index, or a function."
    )
