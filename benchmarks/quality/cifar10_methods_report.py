"""The tables of `cifar10_methods`."""

from __future__ import annotations

from typing import Any

from ..harness.report import Rows, Table, spread

PERCENT = ("accuracy", "accuracy at 80%", "accuracy at 90%")
HEADINGS = {
    "accuracy": "accuracy %",
    "Brier score": "Brier",
    "accuracy at 80%": "at 80 %",
    "accuracy at 90%": "at 90 %",
}


def tables(rows: Rows) -> list[Table]:
    """The NLL on all sets of images, then a table for each, one of foreign images, and one of costs.

    Means and standard deviations over seeds.
    """
    groups: dict[str, Rows] = {}
    for row in rows:
        groups.setdefault(row["row"], []).append(row)
    several = any(len(runs) > 1 for runs in groups.values())
    seeds = "mean ± standard deviation over seeds" if several else "one seed"
    known = [
        Table(f"{name}: {seeds}", ["", *(HEADINGS.get(each, each) for each in scores)], _scored(groups, name))
        for name, scores in rows[0]["known"].items()
    ]
    nll = [
        [row, *(spread([run["known"][name]["NLL"] for run in runs]) for name in rows[0]["known"])]
        for row, runs in groups.items()
    ]
    odd = list(rows[0]["odd"])
    told = [
        [name, *(_told(runs, foreign, score) for foreign in odd for score in ("entropy", "mutual information"))]
        for name, runs in groups.items()
    ]
    headings = ["", *(f"{foreign}\n{score}" for foreign in odd for score in ("entropy", "mutual inf."))]
    return [
        Table(f"NLL: {seeds}", ["", *rows[0]["known"]], nll),
        *known,
        Table("AUROC / FPR95, %: foreign images told from the test images", headings, told),
        Table(
            "Costs, in seconds and milliseconds of one core",
            ["", "setting", "seeds", "training", "networks", "ms per image", "x deterministic"],
            _costs(groups),
            names=2,
        ),
    ]


def _scored(groups: dict[str, Rows], name: str) -> list[list[str]]:
    found = []
    for row, runs in groups.items():
        cells = []
        for score in runs[0]["known"][name]:
            values = [run["known"][name][score] for run in runs]
            cells.append(spread([100 * each for each in values], 1) if score in PERCENT else spread(values))
        found.append([row, *cells])
    return found


def _told(runs: Rows, foreign: str, score: str) -> str:
    found = [run["odd"][foreign][score] for run in runs if score in run["odd"][foreign]]
    if not found:
        return ""
    return " / ".join(spread([100 * each[metric] for each in found], 0) for metric in ("AUROC", "FPR95"))


def _costs(groups: dict[str, Rows]) -> list[list[str]]:
    means = {row: sum(run["prediction ms"] for run in runs) / len(runs) for row, runs in groups.items()}
    plain = means.get("deterministic")
    return [
        [
            row,
            _setting(runs[0]),
            str(len(runs)),
            f"{sum(run['training s'] for run in runs) / len(runs):.0f}",
            str(runs[0]["networks"]),
            f"{means[row]:.2f}",
            f"{means[row] / plain:.1f}" if plain else "",
        ]
        for row, runs in groups.items()
    ]


def _setting(run: dict[str, Any]) -> str:
    temperature = run.get("divided by", 1.0)
    return ", ".join(filter(None, [run["setting"], f"T {temperature:.2f}" if temperature != 1 else ""]))
