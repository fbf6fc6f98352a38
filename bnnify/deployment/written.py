"""A file that was executed in its own runtime, and computes there what the networks do."""

__all__ = ["Trial", "fresh", "write_checked"]

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ..checkpoints.atomic import replace_atomically
from ..errors import BnnifyError, ExportError
from ..prediction.batches import Arguments
from ..torch_internals import tree_map
from .agreement import largest_difference
from .formats import Format
from .trace import first_line


@dataclass(frozen=True)
class Trial:
    """Arguments of the model, the outputs that are expected for them, and how far rounding may take each of these."""

    arguments: Arguments
    expected: Mapping[str, Tensor]
    tolerance: Mapping[str, float]


def write_checked(
    program: ExportedProgram,
    form: Format,
    path: str | os.PathLike[str],
    inputs: Sequence[str],
    trials: Sequence[Trial],
) -> tuple[int, float]:
    """Write ``program`` to ``path`` if the runtime of the format ``form`` computes what the ``trials`` expect.

    ``inputs`` are the names of the input tensors.

    Returns:
        The size of the file in bytes, and the largest difference.

    Raises:
        CheckpointError: The file cannot be written.
        ExportError: The format does not take the program, or the outputs differ.
    """
    with replace_atomically(path) as file:
        # Libraries look at the ending of a file's name, and may put others beside it.
        with TemporaryDirectory(prefix=".export-", dir=Path(file.name).parent) as folder:
            temporary = Path(folder, Path(path).name)
            try:
                outputs = list(trials[0].expected)
                form.write(program, temporary, inputs, outputs)
                run = form.load(temporary, outputs)
                largest = max(_difference(run(trial.arguments), trial) for trial in trials)
            except (BnnifyError, OSError):
                raise
            except Exception as error:
                cause: BaseException = error
                while cause.__cause__ is not None:  # the first error tells most
                    cause = cause.__cause__
                raise ExportError(
                    f"The format {form.name!r} cannot hold or run this model: {type(cause).__name__}: "
                    f"{first_line(cause)} Nothing was written."
                ) from error
            nbytes = temporary.stat().st_size
            os.replace(temporary, file.name)
    return nbytes, largest


def _difference(found: Mapping[str, Tensor], trial: Trial) -> float:
    largest = 0.0
    for name, wanted in trial.expected.items():
        value = found[name]
        if (value.shape, value.dtype) != (wanted.shape, wanted.dtype):
            raise ExportError(
                f"In its runtime the file computes `{name}` as {value.dtype} of shape {tuple(value.shape)}, and the "
                f"networks as {wanted.dtype} of shape {tuple(wanted.shape)}. Nothing was written."
            )
        difference = largest_difference(value, wanted)
        if difference > trial.tolerance[name]:
            raise ExportError(
                f"In its runtime the file computes `{name}` otherwise than the networks: by {difference:.2g}, where "
                f"rounding explains {trial.tolerance[name]:.2g}. Nothing was written."
            )
        largest = max(largest, difference)
    return largest


def fresh(arguments: Arguments, seed: int, growing: Mapping[int, int]) -> Arguments:
    """Other values of the same kind: numbers between the least and the largest of a tensor, evenly distributed.

    What holds nothing but zeros and ones may be a mask, of which not every one makes sense: its rows change places.

    Args:
        arguments: An example.
        seed: Of the random numbers.
        growing: How many times the rows of a tensor, by its id, are to be there. Default of each: once.
    """
    generator = torch.Generator().manual_seed(seed)

    def other(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or leaf.numel() == 0 or leaf.is_complex():
            return leaf
        leaf = torch.cat([leaf] * growing.get(id(leaf), 1))
        low, high = leaf.min().item(), leaf.max().item()
        if leaf.is_floating_point():
            made = low + (high - low) * torch.rand(leaf.shape, generator=generator, dtype=torch.float64, device="cpu")
        elif low >= 0 and high <= 1:
            made = leaf.flip(0)
        else:
            made = torch.randint(int(low), int(high) + 1, leaf.shape, generator=generator, device="cpu")
        return made.to(leaf)

    return tree_map(other, arguments)
