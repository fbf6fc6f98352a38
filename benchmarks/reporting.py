"""What the speed benchmarks share: options, the table with what it was measured on, and the JSON."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

LIBRARIES = ("torch", "torchvision", "bayesian-torch", "torchbnn", "blitz-bayesian-pytorch")


def parser(description: str | None) -> argparse.ArgumentParser:
    """With the options that all of the scripts have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--rounds", type=int, default=21, help="rounds that are measured, after three that are not")
    made.add_argument("--threads", type=int, default=2, help="threads of the CPU")
    made.add_argument(
        "--at-least", type=float, default=10.0, help="ms; a call that takes less is repeated in its round"
    )
    made.add_argument("--output", type=Path, help="where to write the results as JSON")
    made.add_argument("--markdown", action="store_true", help="print the tables in Markdown")
    return made


def add_networks(made: argparse.ArgumentParser, workloads: Sequence[str], default: Iterable[str]) -> None:
    """The options of the scripts that compare the libraries on several networks."""
    made.add_argument("--workloads", nargs="+", choices=workloads, default=list(default), help="what to measure")
    made.add_argument("--variants", nargs="+", help="only these rows, besides the deterministic one")
    made.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    made.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 is by autocast")
    made.add_argument("--channels-last", action="store_true", help="the memory format of convolutions")


def prepare(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    torch._dynamo.config.recompile_limit = 64  # the variants share the code of their forward
    torch.backends.cudnn.benchmark = True  # each network always sees inputs of one shape


def autocast(device: str, dtype: str) -> torch.autocast:
    """Of no effect unless ``dtype`` asks for bfloat16."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16")


def chosen(options: argparse.Namespace, variants: Iterable[str]) -> list[str]:
    """Those of the variants that were asked for, the deterministic one first."""
    asked = options.variants
    return ["deterministic", *(name for name in variants if name != "deterministic" and (not asked or name in asked))]


def report(options: argparse.Namespace, results: dict[str, Any]) -> dict[str, Any]:
    """All there is to know about a run; also written to a file if one was named."""
    device = torch.device(getattr(options, "device", "cpu"))
    made = {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "versions": {"python": platform.python_version()} | dict(_versions()),
        "machine": {"processor": _processor(), "threads": torch.get_num_threads()}
        | ({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}),
        "options": {name: value for name, value in vars(options).items() if not isinstance(value, Path)},
        "results": results,
    }
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(made, indent=1) + "\n")
    return made


@dataclass(frozen=True)
class Part:
    """A question and its answer: a table, and all that was found."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    """A row of one cell is the heading of those that follow."""
    found: Any


def ratio_part(title: str, results: dict[str, dict[str, Any]]) -> Part:
    """A row for each variant of each workload, as :func:`interleaved.summary` gives them."""
    found = [row for rows in results.values() for row in rows.values()]
    references = list(dict.fromkeys(reference for row in found for reference in row["ratio"]))
    counted = ["Bayesian weights"] if any("weights" in row for row in found) else []
    rows: list[list[str]] = []
    for workload, variants in results.items():
        rows.append([workload])
        for name, row in variants.items():
            of = {
                reference: "1" if reference == name else quartiles(row["ratio"].get(reference))
                for reference in references
            }
            count = [f"{row['weights']:,}" if row["weights"] else ""] if counted else []
            rows.append([name, *count, digits(row["median ms"]), *of.values()])
    return Part(title, ["", *counted, "ms", *(f"× {reference}" for reference in references)], rows, results)


def show(made: dict[str, Any], *parts: Part, notes: Iterable[str] = ()) -> None:
    """Prints the tables, and under them what they were measured on."""
    for part in parts:
        if made["options"]["markdown"]:
            print(f"{part.title}\n\n{_markdown(part)}\n")
        else:
            Console(width=160).print(_table(part))
    threads = made["machine"]["threads"]
    machine = f"{threads} thread{'s' * (threads != 1)} of {made['machine']['processor']}"
    machine = ", ".join([*filter(None, [made["machine"].get("gpu")]), machine])
    versions = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
    timed = any("ms" in heading for part in parts for heading in part.headings)
    how = [f"{made['options']['rounds']} rounds; × is the median [quartiles] of the ratio to the same round"] * timed
    print("\n".join([*how, *notes, made["command"], versions, machine]))


def _table(part: Part) -> Table:
    table = Table(title=part.title)
    for number, heading in enumerate(part.headings):
        table.add_column(heading, justify="right" if number else "left")
    for row in part.rows:
        if len(row) == 1:
            table.add_section()
            row = [f"[bold]{row[0]}[/]"]
        table.add_row(*row)
    return table


def _markdown(part: Part) -> str:
    width = len(part.headings)
    rows = [part.headings, ["---", *["---:"] * (width - 1)], *part.rows]
    return "\n".join("| " + " | ".join([*row, *[""] * (width - len(row))]) + " |" for row in rows)


def digits(value: float) -> str:
    """Three significant digits."""
    return f"{value:#.3g}".rstrip(".") if abs(value) < 1000 else f"{value:,.0f}"


def quartiles(found: tuple[float, float, float] | None) -> str:
    """The median, and the first and third quartile in brackets."""
    return f"{digits(found[1])} [{digits(found[0])}, {digits(found[2])}]" if found else ""


def _versions() -> Iterable[tuple[str, str]]:
    for library in LIBRARIES:
        try:
            yield library, version(library)
        except PackageNotFoundError:
            yield library, "not installed"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
