"""Fetches what a benchmark needs from the network, or says what else would do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def fetched(what: str, fetch: Callable[[], T]) -> T:
    """What ``fetch`` returns; where it cannot be had, the program ends with one line that says what to do."""
    try:
        return fetch()
    except (OSError, RuntimeError) as error:  # torchvision raises the second for what arrived damaged
        reason = str(error).partition("\n")[0]
        raise SystemExit(
            f"{what} cannot be downloaded ({type(error).__name__}: {reason}). Without a network, pass a folder that "
            "has it with --data; benchmarks/README.md says what belongs there."
        ) from None


def in_folder(data: Path, name: str) -> Path:
    """The path of what has to be in a data folder; where it is missing, the program ends with one line."""
    path = data / name
    if not path.exists():
        raise SystemExit(f"`{path}` is missing: benchmarks/README.md says what belongs into the folder of --data.")
    return path
