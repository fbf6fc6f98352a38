"""Convert every model of torchvision, timm and transformers that has a case, and check what conversion promises.

Usage::

    python -m benchmarks.sweep.sweep --families torchvision,timm,transformers --output sweep.json
    python -m benchmarks.sweep.sweep --families timm --only "swin*" --limit 300
    python -m benchmarks.sweep.sweep --read sweep.json --markdown

Each model runs in a process of its own, with random weights and a time limit. The JSON is written after each model.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tests import contract
from tests.contract import CHECKS, Case, Outcome

from ..harness.report import Table, show, versions
from . import families

PACKAGES = ("torch", "torchvision", "timm", "transformers")


@dataclass
class Result:
    """What the checks found of one model.

    Attributes:
        family: Where the model is from.
        name: As its library calls it.
        refuses: Whether it must refuse to be converted, so that there is nothing else to check.
        outcomes: One for each check that was reached.
        seconds: How long its process took.
    """

    family: str
    name: str
    refuses: bool
    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0

    def status(self, check: str) -> str:
        """``"pass"``, ``"fail"``, ``"n/a"``, or ``"not reached"``."""
        missing = "n/a" if self.refuses else "not reached"
        return next((outcome.status for outcome in self.outcomes if outcome.check == check), missing)

    @property
    def failures(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.status == "fail"]


def main() -> int:
    arguments = parse()
    console = Console(highlight=False)
    found_with = versions(PACKAGES)
    if arguments.read:
        found_with, results = read(arguments.read)
    else:
        chosen = list(choose(arguments.families.split(","), arguments.only))
        results = []
        for result in sweep(chosen, arguments.limit, arguments.jobs):
            results.append(result)
            if arguments.output:
                write(arguments.output, results)
            verdict = "[red]FAIL[/]" if result.failures else "[green]ok[/]"
            console.print(
                f"{len(results)}/{len(chosen)} {verdict} {result.family} {result.name} {result.seconds:.1f} s"
            )
    show(table(results), arguments.markdown)
    failures = [(result, outcome) for result in results for outcome in result.failures]
    for result, outcome in failures:
        print(f"- {result.family} `{result.name}`, {outcome.check}: {outcome.detail}")
    if not failures:
        print("No failures.")
    print(", ".join(f"{name} {number}" for name, number in found_with.items()))
    return int(bool(failures))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(families.FAMILIES), help="separated by commas")
    parser.add_argument("--only", default="*", metavar="GLOB", help="only the models whose name matches")
    parser.add_argument("--limit", type=float, default=900.0, metavar="SECONDS", help="for one model; default: 900")
    parser.add_argument("--jobs", type=int, default=1, help="models at the same time; default: 1")
    parser.add_argument("--output", type=Path, metavar="JSON", help="where to write everything that was found")
    parser.add_argument("--read", type=Path, nargs="+", metavar="JSON", help="print what earlier runs found")
    parser.add_argument("--markdown", action="store_true", help="print the table and the failures as Markdown")
    return parser.parse_args()


def choose(names: Iterable[str], only: str) -> Iterator[tuple[str, Case]]:
    for family in names:
        for name, case in families.cases(family).items():
            if fnmatchcase(name, only):
                yield family, case


def sweep(chosen: list[tuple[str, Case]], limit: float, jobs: int) -> Iterator[Result]:
    """Examine the models, each in a process of its own; yields each result as it is known."""
    # The server imports the libraries once; each process is a fork of it, and has them from the start. It finds
    # modules by the environment alone, and what it does not find it passes over in silence.
    root = str(Path(__file__).resolve().parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    context = multiprocessing.get_context("forkserver")
    modules = {f"{families.__name__}.{family}_models" for family, _ in chosen}
    context.set_forkserver_preload([contract.__name__, *modules])
    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(run, context, family, case, limit) for family, case in chosen]
        for future in as_completed(running):
            yield future.result()


def run(context: Any, family: str, case: Case, limit: float) -> Result:
    """Examine one model in a process, which is killed at the limit."""
    result = Result(family, case.name, case.refuses)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(sender, family, case.name), daemon=True)
    start = time.perf_counter()
    process.start()
    sender.close()
    ended = ""
    while not ended:
        left = limit - (time.perf_counter() - start)
        if left <= 0 or not receiver.poll(left):
            ended = f"killed after {limit:.0f} s"
            process.kill()
            break
        try:
            outcome = receiver.recv()
        except EOFError:
            process.join()
            ended = (
                "done" if process.exitcode == 0 else f"the process ended with {process.exitcode} (-9: out of memory?)"
            )
        else:
            result.outcomes.append(outcome)
    process.join()
    receiver.close()
    result.seconds = time.perf_counter() - start
    if ended != "done":
        last = result.outcomes[-1].check if result.outcomes else "the start"
        result.outcomes.append(Outcome(f"after {last}", "fail", ended, result.seconds))
    return result


def work(sender: Connection, family: str, name: str) -> None:
    """What the process of one model does."""
    torch.set_num_threads(1)
    for outcome in contract.examine(families.cases(family)[name]):
        sender.send(outcome)
    sender.close()


def write(path: Path, results: list[Result]) -> None:
    models = [asdict(result) for result in results]
    path.write_text(json.dumps({"versions": versions(PACKAGES), "models": models}, indent=1, ensure_ascii=False))


def read(paths: Iterable[Path]) -> tuple[dict[str, str], list[Result]]:
    """What earlier runs have written: the versions that they ran with, and of each model the latest result."""
    found_with: dict[str, str] = {}
    results: dict[tuple[str, str], Result] = {}
    for path in paths:
        content = json.loads(path.read_text())
        found_with |= content["versions"]
        for model in content["models"]:
            outcomes = [Outcome(**outcome) for outcome in model.pop("outcomes")]
            results[model["family"], model["name"]] = Result(**model, outcomes=outcomes)
    return found_with, list(results.values())


def table(results: list[Result]) -> Table:
    """How many models of each family passed each check, of those that it applies to."""
    names = list(dict.fromkeys(result.family for result in results))
    of_family = {name: [result for result in results if result.family == name] for name in names}
    rows = []
    for check in CHECKS:
        found = [[result.status(check) for result in of_family[name]] for name in names]
        rows.append([check, *(f"{of.count('pass')} / {len(of) - of.count('n/a')}" for of in found)])
    whole = [f"{sum(not result.failures for result in of_family[name])} / {len(of_family[name])}" for name in names]
    return Table("models that pass / models that it applies to", ["check", *names], [*rows, ["all of them", *whole]])


if __name__ == "__main__":
    sys.exit(main())
