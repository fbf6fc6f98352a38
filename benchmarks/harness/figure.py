"""Figures, drawn without a display."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def figure(path: Path, columns: int = 1, size: tuple[float, float] = (9.0, 3.4), **options: Any) -> Iterator[Any]:
    """The panels of a figure in one row, which is written to ``path`` at the end; a folder it lacks is made.

    Args:
        path: The file.
        columns: How many panels. Default: ``1``.
        size: Width and height in inches.
        options: Further ones of ``pyplot.subplots``.

    Yields:
        The figure and the list of its panels.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made, panels = pyplot.subplots(1, columns, figsize=size, layout="constrained", squeeze=False, **options)
    yield made, list(panels[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path)
    pyplot.close(made)
