"""CSV and Parquet: numbers with a column for the target, or paths of images and labels."""

__all__ = ["read_table"]

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import ArgumentError, needing
from .examples import Examples, Request
from .images import is_image, read_paths
from .labels import class_numbers

_LABELS = ("label", "labels", "class", "target", "y")
"""The columns that hold the target if nothing is said."""


def read_table(source: str, request: Request) -> Examples:
    """Read a table; a target of real numbers is a regression, and whole numbers or names are classes.

    Raises:
        ArgumentError: There is no such column, no row, a cell that is no number, or no target where one is needed.
    """
    path = Path(source)
    with needing("pandas pyarrow" if path.suffix == ".parquet" else "pandas", f"To read `{source}`"):
        import pandas

        try:
            if path.suffix == ".parquet":
                frame = pandas.read_parquet(path)
            else:
                frame = pandas.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",")
        except ImportError:
            raise
        except Exception as error:
            raise ArgumentError(f"Cannot read the table `{source}`: {str(error).splitlines()[0]}.") from error
    if not len(frame):
        raise ArgumentError(f"`{source}` has no rows.")
    target = _target_column(source, list(map(str, frame.columns)), request)
    labels = None if target is None else frame[target].tolist()
    others = [column for column in frame.columns if str(column) != target]
    pictures = [column for column in others if frame[column].map(is_image).all()]
    if pictures:
        return read_paths(source, frame[pictures[0]].tolist(), labels, request)
    wrong = [str(column) for column in others if not pandas.api.types.is_numeric_dtype(frame[column])]
    if wrong:
        raise ArgumentError(
            f"`{source}` has columns that are no numbers: {', '.join(wrong[:5])}. Leave them out, or turn them into "
            "numbers as the network was trained with."
        )
    if bad := [str(column) for column in others if frame[column].isna().any()]:
        raise ArgumentError(f"`{source}` has empty cells in the columns {', '.join(bad[:5])}.")
    rows = torch.from_numpy(frame[others].to_numpy(dtype="float32"))
    targets, classes = targets_of(source, labels, request)
    return Examples(rows.__getitem__, [str(number) for number in range(len(rows))], targets, classes)


def _target_column(source: str, columns: list[str], request: Request) -> str | None:
    wanted = [request.target] if request.target is not None else [name for name in _LABELS if name in columns]
    if wanted and wanted[0] in columns:
        return wanted[0]
    some = ", ".join(columns[:10]) + (", …" if len(columns) > 10 else "")
    if request.target is not None and request.labelled is not False:
        raise ArgumentError(f"`{source}` has no column {request.target!r}; it has {some}.")
    if request.labelled is not False:
        raise ArgumentError(f"Say with --target which column of `{source}` is the target; it has {some}.")
    return None


def targets_of(source: str, labels: list[Any] | None, request: Request) -> tuple[Tensor | None, tuple[str, ...]]:
    """Return the targets as a tensor, real numbers as float32 and others as class numbers, and the classes' names."""
    if labels is None:
        return None, ()
    if all(isinstance(label, (int, float)) for label in labels) and any(isinstance(label, float) for label in labels):
        found = torch.tensor(labels, dtype=torch.float32)
        if not found.isfinite().all():
            raise ArgumentError(f"`{source}` has a target that is empty or no number.")
        return found, ()
    return class_numbers(source, labels, request.classes)
