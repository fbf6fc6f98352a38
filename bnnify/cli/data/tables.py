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
                # Only an empty cell is one: a class may be called None or NA.
                separator = "\t" if path.suffix == ".tsv" else ","
                frame = pandas.read_csv(path, sep=separator, keep_default_na=False, na_values=[""])
        except ImportError:
            raise
        except Exception as error:
            raise ArgumentError(f"Cannot read the table `{source}`: {str(error).splitlines()[0]}.") from error
    if not len(frame):
        raise ArgumentError(f"`{source}` has no rows.")
    target = _target_column(source, list(map(str, frame.columns)), request)
    if target is not None and frame[target].isna().any():
        raise ArgumentError(f"`{source}` has a target that is empty, in the column {target!r}.")
    labels = None if target is None else frame[target].tolist()
    others = [column for column in frame.columns if str(column) != target]
    pictures = [column for column in others if frame[column].map(is_image).any()]
    if pictures:
        if not frame[pictures[0]].map(is_image).all():
            raise ArgumentError(f"`{source}` has a cell that names no image, in the column {str(pictures[0])!r}.")
        return read_paths(source, frame[pictures[0]].tolist(), labels, request)
    if request.features:
        if absent := [name for name in request.features if name not in map(str, others)]:
            raise ArgumentError(
                f"`{source}` lacks the columns {', '.join(absent[:5])}, which the network takes: "
                f"{', '.join(request.features[:10])}."
            )
        by_name = {str(column): column for column in others}
        others = [by_name[name] for name in request.features]
    wrong = [str(column) for column in others if not pandas.api.types.is_numeric_dtype(frame[column])]
    if wrong:
        raise ArgumentError(
            f"`{source}` has columns that are no numbers: {', '.join(wrong[:5])}. Leave them out, or turn them into "
            "numbers as the network was trained with."
        )
    if bad := [str(column) for column in others if frame[column].isna().any()]:
        raise ArgumentError(f"`{source}` has empty cells in the columns {', '.join(bad[:5])}.")
    rows = torch.from_numpy(frame[others].to_numpy(dtype="float32"))
    if not rows.isfinite().all():
        raise ArgumentError(f"`{source}` has numbers that are not finite, among its inputs.")
    targets, classes = targets_of(source, labels, request)
    names = [str(number) for number in range(len(rows))]
    return Examples(rows.__getitem__, names, targets, classes, features=tuple(map(str, others)))


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
    if request.numbers and not all(isinstance(label, (int, float)) for label in labels):
        wrong = next(label for label in labels if not isinstance(label, (int, float)))
        raise ArgumentError(
            f"`{source}` has the target {wrong!r}, which is no number, and the output of the network is a regression."
        )
    if request.numbers:
        labels = [float(label) for label in labels]
    if all(isinstance(label, (int, float)) for label in labels) and any(isinstance(label, float) for label in labels):
        found = torch.tensor(labels, dtype=torch.float32)
        if not found.isfinite().all():
            raise ArgumentError(f"`{source}` has a target that is empty or no number.")
        return found, ()
    return class_numbers(source, labels, request.classes)
