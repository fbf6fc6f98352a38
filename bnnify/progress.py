"""The bar that shows how far long work is."""

__all__ = ["forwards_bar", "progress_bar"]

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .errors import needing


def progress_bar(wanted_by: str, transient: bool = False) -> Any:
    """Make a ``rich.progress.Progress`` on standard error: what is done of how much, the rate, and the time left.

    Args:
        wanted_by: What asked for it, for the error.
        transient: Remove it when the work is done. Default: ``False``.

    Raises:
        MissingLibraryError: rich is not installed.
    """
    with needing("rich", wanted_by):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            ProgressColumn,
            TextColumn,
            TimeRemainingColumn,
        )
        from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:.3g}/s")

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=transient,
    )


@contextmanager
def forwards_bar(caller: str, forwards: int, batches: int | None, wanted: bool) -> Iterator[Callable[[], None]]:
    """Give a function to call after each forward, of so many a batch, which moves a bar on if one is ``wanted``."""
    if not wanted:
        yield lambda: None
        return
    with progress_bar(f"{caller}(progress=True)") as progress:
        task = progress.add_task(caller, total=None if batches is None else batches * forwards)
        yield lambda: progress.advance(task)
