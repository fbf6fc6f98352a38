"""The table of readers. A new kind of data is one entry here."""

__all__ = ["READERS", "Reader", "read_data"]

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...errors import ArgumentError
from .arrays import read_arrays
from .examples import Examples, Request
from .images import read_folder
from .own import read_own
from .tables import read_table
from .texts import read_texts


@dataclass(frozen=True)
class Reader:
    """A kind of data: what it is called, which ``--data`` is of it, and what reads it."""

    kind: str
    fits: Callable[[str], bool]
    read: Callable[[str, Request], Examples]


def _ending(*endings: str) -> Callable[[str], bool]:
    return lambda source: source.lower().endswith(endings)


READERS = (
    Reader("a folder with a folder of images for each class", lambda source: Path(source).is_dir(), read_folder),
    Reader("a table, .csv, .tsv or .parquet", _ending(".csv", ".tsv", ".parquet"), read_table),
    Reader("arrays, .npz", _ending(".npz"), read_arrays),
    Reader("texts, .jsonl", _ending(".jsonl"), read_texts),
    Reader("package.module:make_loader", lambda source: re.fullmatch(r"[\w.]+:[\w.]+", source) is not None, read_own),
)


def read_data(source: str, request: Request) -> Examples:
    """Read what ``--data`` names, with the first reader that it is for.

    Raises:
        ArgumentError: It is not there, of no known kind, or cannot be read.
    """
    reader = next((reader for reader in READERS if reader.fits(source)), None)
    if reader is None and not Path(source).exists():
        raise ArgumentError(f"`{source}` is not there.")
    if reader is None:
        raise ArgumentError(f"`{source}` is of no known kind. Data are {'; '.join(each.kind for each in READERS)}.")
    if reader.read is not read_own and not Path(source).exists():
        raise ArgumentError(f"`{source}` is not there.")
    return reader.read(source, request)
