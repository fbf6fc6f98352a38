"""The base of likelihoods, which say what the output of a model means."""

__all__ = ["IGNORED", "Likelihood", "has_values"]

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from ..distributions.gaussian import at_least_float32
from ..errors import ArgumentError, ArgumentTypeError, check_integer
from ..torch_internals import in_transform

IGNORED = -100
"""The target that does not count by default, as in torch.nn.functional.cross_entropy."""


class Likelihood:
    """p(y|x, w), given the output of a model: the base of all likelihoods.

    A new likelihood is a subclass in :mod:`.known_likelihoods` that overrides what is different.

    Args:
        class_dim: The dimension of the classes, if it has classes. Default: the last one.

    Attributes:
        ignore_index: A target with this value does not count, among classes and yes/no answers.
    """

    name: ClassVar[str]
    has_classes: ClassVar[bool] = False
    is_discrete: ClassVar[bool] = False  # classes, or yes and no
    ignore_index: int = IGNORED

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

    def energy(self, parts: tuple[Tensor, ...]) -> Tensor | None:
        """-log Σ exp(logits), larger for what is foreign (Liu et al. 2020); None without logits of classes."""
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
            f"likelihood={self.name!r} does not tell how probable a target is. Pass 'logits' for classes, for a "
            "regression the NLL module of its training, such as bnnify.GaussianNLL, or 'gaussian' for a pair (mean, "
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


def has_values(value: Tensor) -> bool:
    """Tell whether the numbers in ``value`` can be looked at: not on the meta device, in a transform or an export."""
    return not (value.is_meta or in_transform() or torch.compiler.is_compiling())


def _one_tensor(found: Any, likelihood: str) -> Tensor:
    if isinstance(found, Tensor):
        return found
    keys = f" with the keys {list(found)}" if isinstance(found, Mapping) else ""
    raise ArgumentTypeError(
        f"likelihood={likelihood!r} needs a tensor, but the model returned {type(found).__name__}{keys}. "
        "Say which part of it with output=: a key, an attribute, an index, or a function."
    )
