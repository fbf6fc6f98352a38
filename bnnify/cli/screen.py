"""What a command shows: reports on standard output, all else on standard error, or one JSON object."""

__all__ = ["Screen", "about"]

import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Screen:
    """Where the output of a command goes.

    Attributes:
        quiet: Show nothing but errors, and the JSON object if it is asked for.
        json: Show one JSON object on standard output, and no report.
    """

    quiet: bool = False
    json: bool = False

    def report(self, text: object) -> None:
        """Print on standard output, unless a JSON object is to stand there."""
        if not self.quiet and not self.json:
            print(text)

    def note(self, text: object) -> None:
        """Print on standard error."""
        if not self.quiet:
            print(text, file=sys.stderr)

    def result(self, found: Mapping[str, Any]) -> None:
        """Print what the command found as one JSON object, if that was asked for."""
        if self.json:
            print(json.dumps(_plain(found), indent=2))

    @property
    def bars(self) -> bool:
        """Whether to show progress bars: on a terminal only, where rich is installed."""
        return not self.quiet and sys.stderr.isatty() and importlib.util.find_spec("rich") is not None

    @contextmanager
    def progress(self, description: str, total: int | None) -> Iterator[Callable[..., None]]:
        """Give a function to call after each step, whose ``description=`` says anew what is done."""
        if not self.bars:
            yield lambda description=None: None
            return
        from ..progress import progress_bar

        with progress_bar("A progress bar", transient=True) as bar:
            task = bar.add_task(description, total=total)

            def advance(description: str | None = None) -> None:
                bar.update(task, advance=1, description=description)

            yield advance


def about(seconds: float) -> str:
    """Say how long something takes, to a digit or two: ``"8 s"``, ``"3 min"``, ``"2 h"``."""
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 1):.0f} s"


def _plain(value: Any) -> Any:
    """Return ``value`` as JSON can hold it: None for a number that is not finite, text for what it has no kind for."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
