"""A run of a benchmark: its options, what it was measured on, its results as JSON, and its tables."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, TypeVar

import rich.table
import torch
from rich.console import Console

T = TypeVar("T")
Rows = list[dict[str, Any]]


def parser(description: str | None, kept: bool = False) -> argparse.ArgumentParser:
    """With the options that all of the scripts have, and ``--from`` for those whose figures are ``kept``."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of the CPU")
    made.add_argument("--output", type=Path, help="where to write the results as JSON")
    made.add_argument("--markdown", action="store_true", help="print the tables in Markdown")
    if kept:
        made.add_argument("--from", dest="kept", type=Path, help="run nothing, print the tables of an --output")
    return made


@dataclass(frozen=True)
class Table:
    """What a script prints.

    Attributes:
        title: What the figures are.
        headings: One for each column.
        rows: The cells; a row of one cell is the heading of those that follow.
        names: How many columns, from the left, hold names instead of numbers. Default: ``1``.
    """

    title: str
    headings: list[str]
    rows: list[list[str]]
    names: int = 1


class Run:
    """One run of a script, which begins when this is made.

    Args:
        options: What :func:`parser` has read. The number of threads is set to what they say.
        libraries: The packages whose versions matter.
    """

    def __init__(self, options: argparse.Namespace, libraries: Iterable[str]) -> None:
        torch.set_num_threads(options.threads)
        self.options = options
        self.libraries = libraries
        self.started, self.used = time.perf_counter(), time.process_time()

    def record(self, results: Any, **facts: Any) -> None:
        """Writes what was found so far, if a file was named.

        To be called after each result, so that an interrupted run leaves what it has measured.
        """
        if self.options.output:
            self.options.output.parent.mkdir(parents=True, exist_ok=True)
            report = self._environment() | facts | {"results": results}
            whole = self.options.output.with_suffix(".part")
            whole.write_text(json.dumps(report, indent=1, default=asdict) + "\n")
            whole.replace(self.options.output)  # a run that is stopped while it writes leaves the file as it was

    def collect(self, results: Iterable[T], already: Iterable[T] = (), **facts: Any) -> list[T]:
        """The results as a list, after those that are there ``already``; each is recorded as soon as it is found."""
        found = list(already)
        for result in results:
            found.append(result)
            self.record(found, **facts)
        return found

    def show(self, *tables: Table, notes: Iterable[str] = ()) -> None:
        """Prints the tables, and under them what they were measured on."""
        for table in tables:
            show(table, self.options.markdown)
        print("\n".join([*notes, *_circumstances(self._environment())]))

    def _environment(self) -> dict[str, Any]:
        device = torch.device(getattr(self.options, "device", "cpu"))
        gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
        return {
            "command": _command(),
            "versions": versions(self.libraries),
            "machine": {"processor": _processor(), "threads": torch.get_num_threads()} | gpu,
            "minutes": round((time.perf_counter() - self.started) / 60, 1),
            # What it would take by itself, with one thread: other work on the machine makes only the minutes more.
            "processor minutes": round((time.process_time() - self.used) / 60, 1),
            "options": {name: value for name, value in vars(self.options).items() if not isinstance(value, Path)},
        }


def run(
    options: argparse.Namespace,
    libraries: Iterable[str],
    compare: Callable[[argparse.Namespace], Iterable[dict[str, Any]]],
    tables: Callable[[Rows], list[Table]],
) -> None:
    """Measures row by row and prints the tables or, if ``--from`` names a file, prints those of an earlier run."""
    if options.kept:
        show_kept(options, tables)
        return
    made = Run(options, libraries)
    made.show(*tables(made.collect(compare(options))))


def show_kept(options: argparse.Namespace, tables: Callable[[Rows], list[Table]]) -> None:
    """Prints the tables of the figures that an earlier run has written, and under them how they were found."""
    found = json.loads(options.kept.read_text())
    for table in tables(found["results"]):
        show(table, options.markdown)
    print("\n".join(_circumstances(found)))


def machine() -> str:
    """The processor and how many threads of it are used, in plain words."""
    return _in_words({"processor": _processor(), "threads": torch.get_num_threads()})


def digits(value: float) -> str:
    """Three significant digits."""
    return f"{value:#.3g}".rstrip(".") if abs(value) < 1000 else f"{value:,.0f}"


def quartiles(found: tuple[float, float, float] | None) -> str:
    """The median, and the first and third quartile in brackets."""
    return f"{digits(found[1])} [{digits(found[0])}, {digits(found[2])}]" if found else ""


def spread(values: list[float], places: int = 3) -> str:
    """The mean, and the standard deviation if there are several values."""
    return f"{fmean(values):.{places}f}" + (f" ± {stdev(values):.{places}f}" if len(values) > 1 else "")


def show(table: Table, markdown: bool) -> None:
    """Prints a table, in Markdown or with lines around it."""
    if markdown:
        print(f"{table.title}\n\n{_markdown(table)}\n")
        return
    printed = rich.table.Table(title=table.title)
    for number, heading in enumerate(table.headings):
        printed.add_column(heading, justify="left" if number < table.names else "right")
    for row in table.rows:
        if len(row) == 1:
            printed.add_section()
            row = [f"[bold]{row[0]}[/]"]
        printed.add_row(*row)
    Console(width=160).print(printed)


def versions(libraries: Iterable[str]) -> dict[str, str]:
    """Those of Python and of the libraries."""
    return {"python": platform.python_version()} | {name: _version(name) for name in libraries}


def _markdown(table: Table) -> str:
    width = len(table.headings)
    aligned = ["---"] * table.names + ["---:"] * (width - table.names)
    rows = [[heading.replace("\n", " ") for heading in table.headings], aligned, *table.rows]
    return "\n".join("| " + " | ".join([*row, *[""] * (width - len(row))]) + " |" for row in rows)


def _command() -> str:
    spec = sys.modules["__main__"].__spec__
    return shlex.join(["python", *(["-m", spec.name] if spec else sys.argv[:1]), *sys.argv[1:]])


def _circumstances(found: dict[str, Any]) -> list[str]:
    """Lines on how figures were found. Those that are put together from several runs have no command and no time."""
    place = [found["machine"].get("gpu"), _in_words(found["machine"])]
    if "minutes" in found:
        place += [f"{found['minutes']} minutes", f"{found['processor minutes']} of a processor"]
    lines = [found.get("command"), *map(_listed, (found["options"], found["versions"])), ", ".join(filter(None, place))]
    return list(filter(None, lines))


def _in_words(machine: dict[str, Any]) -> str:
    threads = machine["threads"]
    return f"{threads} thread{'s' * (threads != 1)} of {machine['processor']}"


def _listed(values: dict[str, Any]) -> str:
    """Numbers and strings by their names; flags and lists are left to the command."""
    shown = {name: value for name, value in values.items() if type(value) in (int, float, str)}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
