"""What a state_dict looks like from outside: names and shapes, and how two of them differ."""

__all__ = ["COUNT", "Difference", "Shapes", "abridged", "printable", "shapes_of"]

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Shapes = dict[str, tuple[int, ...]]

# BatchNorm counts its batches since torch 0.4; torch itself counts from zero where a file has no count.
COUNT = "num_batches_tracked"


def shapes_of(state_dict: Mapping[Any, Any]) -> Shapes:
    """The shapes of the tensors in ``state_dict``; whatever else it holds is left out."""
    # A nested tensor has no shape, and is no weight of any model.
    tensors = {name: value for name, value in state_dict.items() if isinstance(value, Tensor) and not value.is_nested}
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if isinstance(name, str)}


@dataclass(frozen=True)
class Difference:
    """How the tensors of a file differ from those of a model; false where they do not. Prints as part of a sentence."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: tuple[str, ...]
    model: Shapes
    file: Shapes

    @staticmethod
    def between(model: Shapes, file: Shapes) -> "Difference":
        return Difference(
            tuple(name for name in model if name not in file and not name.endswith(COUNT)),
            tuple(name for name in file if name not in model),
            tuple(name for name, shape in model.items() if file.get(name, shape) != shape),
            model,
            file,
        )

    @property
    def is_of_few_shapes(self) -> bool:
        """Whether the names agree, and most shapes too."""
        return not self.missing and not self.unexpected and 3 * len(self.reshaped) <= len(self.model)

    @property
    def fitting(self) -> int:
        """How many of the model's tensors are in the file, with their shape."""
        return sum(self.file.get(name) == shape for name, shape in self.model.items())

    @property
    def named(self) -> int:
        """How many names the file has, counts of batches aside."""
        return sum(not name.endswith(COUNT) for name in self.file)

    @property
    def shared(self) -> int:
        """How many of them the model has too."""
        return sum(name in self.model and not name.endswith(COUNT) for name in self.file)

    @property
    def similarity(self) -> float:
        """From 0 to 1: the cosine between the two sets of names."""
        own = sum(not name.endswith(COUNT) for name in self.model)
        return self.shared / math.sqrt(max(1, own * self.named))

    @property
    def agreement(self) -> float:
        """From 0 to 1: how much of both is in common, by name and by shape."""
        shared = len(self.model.keys() & self.file.keys())
        return (shared + self.fitting) / max(1, 2 * len(self.model.keys() | self.file.keys()))

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.reshaped)

    def __str__(self) -> str:
        reshaped = [f"{printable(name)} {self.file[name]} for {self.model[name]}" for name in self.reshaped]
        kinds = {
            "missing": map(printable, self.missing),
            "unexpected": map(printable, self.unexpected),
            "of another shape": reshaped,
        }
        return "; ".join(f"{kind}: {listing}" for kind, names in kinds.items() if (listing := abridged(names)))


def printable(name: str) -> str:
    """A name from a file, fit for one line of a terminal."""
    return f"`{name[:80].encode('unicode_escape').decode('ascii')}`"


def abridged(names: Iterable[str]) -> str:
    """The first three of ``names``, and how many more there are."""
    first, rest = (names := list(names))[:3], len(names[3:])
    return ", ".join(first) + (f" and {rest} more" if rest else "")
