"""A loader that a function of the user's own makes."""

__all__ = ["OwnBatches", "read_own"]

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ...errors import ArgumentError, describe
from ...prediction.batches import batches_of, is_one_batch, rows_of
from ..arguments import made_by
from .examples import Examples, Request


@dataclass(frozen=True)
class OwnBatches(Examples):
    """The batches of a loader, passed on as they are, by the rule for data of :func:`bnnify.prediction.predict`.

    Attributes:
        loader: The loader.
        most: After how many examples to stop. Default: ``None``, with the last one.
    """

    loader: Iterable[Any] = ()
    most: int | None = None

    def __len__(self) -> int:
        """The number of examples, which only a loader with a ``dataset`` knows; 0 if it does not."""
        try:
            return len(self.loader.dataset)  # type: ignore[attr-defined]
        except (AttributeError, TypeError):
            return 0

    @property
    def labelled(self) -> bool:
        """Whether there are targets, as far as the first batch tells."""
        batch = next(iter(self.loader), None)
        return "labels" in batch if isinstance(batch, Mapping) else isinstance(batch, (tuple, list)) and len(batch) == 2

    def batches(self, batch_size: int, order: Sequence[int] | None = None) -> Iterable[Any]:
        """Give the batches of the loader, whose size and order are its own."""
        return self.loader if self.most is None else self._first(self.most)

    def _first(self, count: int) -> Iterator[Any]:
        for batch in self.loader:
            yield batch
            count -= next((rows_of(arguments) or 1 for arguments in batches_of([batch], nn.Identity())), 1)
            if count <= 0:
                return

    def chosen(self, numbers: Sequence[int]) -> Examples:
        """Raise an ArgumentError: a loader gives its batches in its own order."""
        raise ArgumentError("A loader of your own cannot be split. Name a second one, with --validation.")

    def limited(self, count: int | None, seed: int) -> Examples:
        """Return the first batches, with ``count`` examples or a few more."""
        return replace(self, most=count or None)

    def split(self, fraction: float, seed: int) -> tuple[Examples, Examples]:
        """Raise an ArgumentError."""
        return self.chosen(()), self


def read_own(source: str, request: Request) -> Examples:
    """Call the function that ``source`` names, as ``package.module:function``, for a loader."""
    loader = made_by("--data", source, {})
    if is_one_batch(loader):
        raise ArgumentError(f"--data {source} made {describe(loader)}, not a loader that gives batches.")
    # The data are gone through more than once, a generator gives its batches once.
    return OwnBatches(inputs=_no_input, names=(), loader=list(loader) if isinstance(loader, Iterator) else loader)


def _no_input(number: int) -> Any:
    raise NotImplementedError
