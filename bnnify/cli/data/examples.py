"""Examples with or without targets, as a reader found them, in batches."""

__all__ = ["Examples", "Request"]

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ...errors import ArgumentError


@dataclass(frozen=True)
class Request:
    """What the command line says of how to read data.

    Attributes:
        image: Makes a tensor of a PIL image.
        target: The column or array of the target.
        text: The column of the text.
        tokenizer: The directory of the tokenizer.
        classes: The names of the classes in the order of the network's outputs; empty if they are not known.
        labelled: Whether targets are needed; None takes those that are there.
        features: The columns of a table in the order of the network's inputs; empty if they are not known.
        numbers: Whether targets are numbers, and never names of classes.
    """

    image: Callable[[Any], Tensor]
    target: str | None = None
    text: str | None = None
    tokenizer: Path | None = None
    classes: tuple[str, ...] = ()
    labelled: bool | None = True
    features: tuple[str, ...] = ()
    numbers: bool = False


@dataclass(frozen=True)
class Examples:
    """Examples, each of which is read when it is asked for.

    Attributes:
        inputs: The number of an example → its input.
        names: What each example is called in a list of predictions.
        targets: One for each example; None without.
        classes: The names of the classes; empty if the data have none.
        pictures: The image files; None for other data.
        features: The columns of a table in the order in which the inputs hold them; empty for other data.
        collate: Makes of a list of inputs the input of the model. Default: ``torch.stack``.
    """

    inputs: Callable[[int], Any]
    names: Sequence[str]
    targets: Tensor | None = None
    classes: tuple[str, ...] = ()
    pictures: Sequence[Path] | None = None
    collate: Callable[[list[Any]], Any] = torch.stack
    features: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def labelled(self) -> bool:
        """Whether there are targets."""
        return self.targets is not None

    def batches(self, batch_size: int, order: Sequence[int] | None = None) -> Iterable[Any]:
        """Give batches ``(inputs, targets)`` or ``(inputs,)``, in this ``order``, by default of all examples."""
        numbers: Any = range(len(self)) if order is None else order
        return DataLoader(numbers, batch_size, collate_fn=self._batch)

    def chosen(self, numbers: Sequence[int]) -> "Examples":
        """Return the examples with these numbers."""
        return replace(
            self,
            inputs=lambda index: self.inputs(numbers[index]),
            names=[self.names[number] for number in numbers],
            targets=None if self.targets is None else self.targets[list(numbers)],
            pictures=None if self.pictures is None else [self.pictures[number] for number in numbers],
        )

    def limited(self, count: int | None, seed: int) -> "Examples":
        """Return ``count`` examples by chance, in their order, or all of them for None and 0."""
        return self if not count or count >= len(self) else self.chosen(sorted(_shuffled(len(self), seed)[:count]))

    def split(self, fraction: float, seed: int) -> tuple["Examples", "Examples"]:
        """Split into two parts by chance, of which the second has this ``fraction`` of the examples.

        Raises:
            ArgumentError: A part would be empty.
        """
        order = _shuffled(len(self), seed)
        held_out = round(fraction * len(order))
        if not 0 < held_out < len(order):
            raise ArgumentError(f"--hold-out {fraction:g} of {len(order)} examples leaves one of the two parts empty.")
        return self.chosen(sorted(order[held_out:])), self.chosen(sorted(order[:held_out]))

    def _batch(self, numbers: list[int]) -> tuple[Any, ...]:
        if self.pictures is None:
            inputs = list(map(self.inputs, numbers))
        else:
            with ThreadPoolExecutor(torch.get_num_threads()) as threads:  # to decode an image needs no lock
                inputs = list(threads.map(self.inputs, numbers))
        try:
            batch = self.collate(inputs)
        except RuntimeError as error:
            shapes = sorted({tuple(each.shape) for each in inputs})
            raise ArgumentError(
                f"The inputs {self.names[numbers[0]]}, … have different shapes, {shapes[0]} and {shapes[-1]}, and make "
                "no batch. Images: give --size."
            ) from error
        return (batch,) if self.targets is None else (batch, self.targets[numbers])


def _shuffled(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
