"""The figures of a full run, kept as JSON in `benchmarks/results`, from which tables can be printed again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import report
from .report import Table, machine, versions


@dataclass(frozen=True)
class Results:
    """What a run has found, and how.

    Attributes:
        settings: Those that the figures depend on; no paths.
        rows: The figures, such as one mapping for each network.
        versions: Of Python and the libraries.
        machine: On what it ran, in plain words.
    """

    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    versions: dict[str, str]
    machine: str

    def notes(self) -> list[str]:
        """The lines to be printed under the tables."""
        lines = [self.settings, self.versions]
        return [", ".join(f"{name} {value}" for name, value in line.items()) for line in lines] + [self.machine]


def save(
    path: Path, settings: dict[str, Any], rows: list[dict[str, Any]], libraries: Iterable[str] = ("torch",)
) -> Results:
    """Writes the figures, with the versions of the libraries and the machine of this process.

    To be called after each result, so that an interrupted run leaves what it has measured.
    """
    results = Results(settings, rows, versions(libraries), machine())
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".part")
    whole.write_text(json.dumps(asdict(results), indent=1) + "\n")
    whole.replace(path)  # a run that is stopped while it writes leaves the file as it was
    return results


def collect(
    rows: Iterable[dict[str, Any]], path: Path | None, settings: dict[str, Any], libraries: Iterable[str]
) -> list[dict[str, Any]]:
    """The rows as a list; if a file is named, each is written as soon as it is there."""
    found: list[dict[str, Any]] = []
    for row in rows:
        found.append(row)
        if path:
            save(path, settings, found, libraries)
    return found


def load(path: Path) -> Results:
    """The figures that :func:`save` has written."""
    return Results(**json.loads(path.read_text()))


def show(path: Path, table: Callable[[list[dict[str, Any]]], Table], markdown: bool) -> None:
    """Prints the table of kept figures, and under it how they were found."""
    kept = load(path)
    report.show(table(kept.rows), markdown)
    print("\n".join(kept.notes()))
