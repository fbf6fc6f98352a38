"""Shows how far a loop is: a bar on a terminal, and now and then a line in a file or a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

import rich.progress
from rich.console import Console

T = TypeVar("T")

SECONDS = 30.0
"""How long nothing may be written to a pipe."""


def track(iterable: Iterable[T], description: str = "working", total: int | None = None) -> Iterator[T]:
    """Goes over an iterable and shows on standard error how far it is.

    Args:
        iterable: What is gone over.
        description: What is done.
        total: How many things it gives. Default: its length, if it has one.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if sys.stderr.isatty():
        console = Console(stderr=True)
        yield from rich.progress.track(iterable, description, total=total, console=console, transient=True)
        return
    started = written = time.perf_counter()
    for number, thing in enumerate(iterable):
        now = time.perf_counter()
        if now - written > SECONDS:
            written = now
            of = "" if total is None else f" of {total}, {_clock((now - started) * (total - number) / number)} left"
            print(f"{description}: {number}{of}", file=sys.stderr, flush=True)
        yield thing


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02}"
