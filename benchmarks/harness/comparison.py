"""Times variants of networks beside each other: the options, the measurement and its table."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from . import report
from .interleaved import drop_failing, interleaved, summary
from .report import Run, Table, digits, quartiles

LIBRARIES = ("torch", "torchvision", "bayesian-torch", "torchbnn", "blitz-bayesian-pytorch")
COMPILED = ", compiled"
REFERENCES = ("deterministic", "deterministic" + COMPILED, "bayesian-torch")
RATIOS = "× is the median [quartiles] of the ratio to the same round"

Calls = dict[str, Callable[[], object]]
"""What is timed, by the names of the rows."""


def parser(description: str | None) -> argparse.ArgumentParser:
    """With the options of the scripts that measure time in rounds."""
    made = report.parser(description)
    made.set_defaults(threads=2)
    made.add_argument("--rounds", type=int, default=21, help="rounds that are measured, after three that are not")
    made.add_argument("--at-least", type=float, default=10.0, help="ms; what takes less is repeated in its round")
    return made


def add_networks(made: argparse.ArgumentParser, workloads: Sequence[str], default: Iterable[str]) -> None:
    """The options of the scripts that compare the libraries on several networks."""
    made.add_argument("--workloads", nargs="+", choices=workloads, default=list(default), help="what to measure")
    made.add_argument("--variants", nargs="+", help="only these rows, besides the deterministic one")
    made.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    made.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 is by autocast")
    made.add_argument("--channels-last", action="store_true", help="the memory format of convolutions")
    made.add_argument("--compile", action="store_true", help="add rows with torch.compile")


def begin(options: argparse.Namespace) -> Run:
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64  # the variants share the code of their forward
    torch.backends.cudnn.benchmark = True  # each network always sees inputs of one shape
    return Run(options, LIBRARIES)


def autocast(device: str, dtype: str) -> torch.autocast:
    """Of no effect unless ``dtype`` asks for bfloat16."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bfloat16")


def chosen(options: argparse.Namespace, variants: Iterable[str]) -> list[str]:
    """Those of the variants that were asked for, the deterministic one first."""
    asked = options.variants
    return ["deterministic", *(name for name in variants if name != "deterministic" and (not asked or name in asked))]


def compare(
    run: Run,
    title: str,
    descriptions: Mapping[str, str],
    make: Callable[[str], tuple[Calls, Mapping[str, int]]],
    notes: Iterable[str] = (),
) -> None:
    """Times the rows of each workload in turn, and prints the table.

    Args:
        run: The run, with the options of :func:`add_networks`.
        title: That of the table.
        descriptions: The workloads, and what the table calls them.
        make: What is timed of a workload, and how many weights are Bayesian in it.
        notes: Lines to be printed under the table.
    """
    options = run.options
    results: dict[str, Any] = {}
    notes = [f"{options.rounds} rounds; {RATIOS}", *notes]
    for key, description in descriptions.items():
        torch.compiler.reset()
        calls, weights = make(key)
        notes += [f"{key}, {why}" for why in drop_failing(calls, [name for name in calls if COMPILED in name])]
        measured = interleaved(calls, options.rounds, options.device, at_least=options.at_least, description=key)
        rows = summary(measured, [name for name in REFERENCES if name in calls])
        results[description] = {name: {"weights": weights[name]} | row for name, row in rows.items()}
        run.record(results)
    run.show(ratio_table(title, results), notes=notes)


def ratio_table(title: str, results: dict[str, dict[str, Any]]) -> Table:
    """A row for each variant of each workload, as :func:`interleaved.summary` gives them."""
    found = [row for rows in results.values() for row in rows.values()]
    references = list(dict.fromkeys(reference for row in found for reference in row["ratio"]))
    counted = ["Bayesian weights"] if any("weights" in row for row in found) else []
    rows: list[list[str]] = []
    for workload, variants in results.items():
        rows.append([workload])
        for name, row in variants.items():
            ratios = [quartiles(row["ratio"].get(reference)) if reference != name else "1" for reference in references]
            count = [f"{row['weights']:,}" if row["weights"] else ""] if counted else []
            rows.append([name, *count, digits(row["median ms"]), *ratios])
    return Table(title, ["", *counted, "ms", *(f"× {reference}" for reference in references)], rows)
