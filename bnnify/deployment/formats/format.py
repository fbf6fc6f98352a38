"""The base of formats: what one has to do."""

__all__ = ["Format", "Runner"]

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, TypeAlias

from torch import Tensor
from torch.export import ExportedProgram

from ...prediction.batches import Arguments

Runner: TypeAlias = Callable[[Arguments], Mapping[str, Tensor]]
"""Executes a file with the arguments of the model, and returns its outputs by name."""


class Format(ABC):
    """A file format and its runtime. A new one is a subclass in a file of its own, and a line in the table."""

    name: ClassVar[str]
    ending: ClassVar[str]
    takes_any_size: ClassVar[bool] = True
    """Whether a dimension may have any size; otherwise each has that of the example, or a largest one."""

    @abstractmethod
    def check(self) -> None:
        """Raise a MissingLibraryError if something that it needs is not installed."""

    @abstractmethod
    def write(self, program: ExportedProgram, path: Path, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        """Write ``program``, which returns a mapping with the keys ``outputs``, to the file ``path``.

        ``inputs`` are the names of its input tensors, in the order in which it takes them.
        """

    @abstractmethod
    def load(self, path: Path, outputs: Sequence[str]) -> Runner:
        """Load a file that :meth:`write` wrote, with these ``outputs``, into its runtime."""
