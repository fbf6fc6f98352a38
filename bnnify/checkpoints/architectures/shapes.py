"""The names and shapes in a state_dict, and how those of two differ."""

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
    """Return the shapes of the tensors in ``state_dict``; whatever else it holds is left out."""
    # A nested tensor has no shape, and is no weight of any model.
    tensors = {name: value for name, value in state_dict.items() if isinstance(value, Tensor) and not value.is_nested}
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if isinstance(name, str)}


@dataclass(frozen=True)
class Difference:
    """The difference of a file's tensors from a model's; false where there is none. Prints as part of a sentence."""

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
    def fitting(self) -> int:
        """Count the tensors of the model that are in the file, with their shape."""
        return sum(self.file.get(name) == shape for name, shape in self.model.items())

    @property
    def named(self) -> int:
        """Count the names in the file, without counts of batches."""
        return sum(not name.endswith(COUNT) for name in self.file)

    @property
    def shared(self) -> int:
        """Count those of them that the model has too."""
        return sum(name in self.model and not name.endswith(COUNT) for name in self.file)

    @property
    def similarity(self) -> float:
        """Return the cosine between the two sets of names, from 0 to 1."""
        own = sum(not name.endswith(COUNT) for name in self.model)
        return self.shared / math.sqrt(max(1, own * self.named))

    @property
    def agreement(self) -> float:
        """Return how much of both is in common, by name and by shape, from 0 to 1."""
        shared = len(self.model.keys() & self.file.keys())
        return (shared + self.fitting) / max(1, 2 * len(self.model.keys() | self.file.keys()))

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.reshaped)

    def __str__(self) -> str:
        kinds = {
            "missing": [printable(name) for name in self.missing],
            "unexpected": [printable(name) for name in self.unexpected],
            "of another shape": [
                f"{printable(name)} {self.file[name]} for {self.model[name]}" for name in self.reshaped
            ],
        }
        return "; ".join(f"{kind}: {abridged(names)}" for kind, names in kinds.items() if names)


def printable(name: str) -> str:
    """Return a name from a file as it may stand in one line of a terminal."""
    return f"`{name[:80].encode('unicode_escape').decode('ascii')}`"


def abridged(names: Iterable[str]) -> str:
    """List the first three of ``names``, and say how many more there are."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
