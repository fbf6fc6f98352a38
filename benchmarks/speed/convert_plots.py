"""The figures of `convert.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..harness.figure import figure


def plot(results: dict[str, Any], folder: Path) -> None:
    """A figure for each part that was measured and has one."""
    for part, draw in FIGURES.items():
        if part in results:
            with figure(folder / f"scaling_{part}.png", size=(5, 3.2)) as (_, (panel,)):
                draw(panel, results[part])
                panel.legend(fontsize=8)


def _size(panel: Any, found: list[dict[str, Any]]) -> None:
    for number, (device, prior) in enumerate(dict.fromkeys((row["device"], row["prior"]) for row in found)):
        rows = [row for row in found if (row["device"], row["prior"]) == (device, prior)]
        heights = [row["ms"] / 1000 for row in rows]
        panel.loglog([row["weights"] for row in rows], heights, "o-", color=f"C{number}", label=f"{device}, {prior}")
    panel.set(xlabel="weights", ylabel="seconds to convert")


def _layers(panel: Any, found: list[dict[str, Any]]) -> None:
    for name in list(found[0])[1:]:
        panel.loglog([row["layers"] for row in found], [row[name] for row in found], "o-", markersize=4, label=name)
    panel.set(xlabel="layers", ylabel="ms")


def _samples(panel: Any, found: list[dict[str, Any]]) -> None:
    panel.loglog([row["K"] for row in found], [row["ratio"][1] for row in found], "o-", markersize=4, label="predict")
    panel.set(xlabel="networks K", ylabel="× a deterministic forward")


def _batch(panel: Any, found: list[dict[str, Any]]) -> None:
    for name in found[0]["ratio"]:
        heights = [row["ratio"][name][1] for row in found]
        panel.semilogx([row["batch"] for row in found], heights, "o-", markersize=4, label=name)
    panel.set(xlabel="batch", ylabel="step, × deterministic", ylim=(0, None))


FIGURES: dict[str, Callable[[Any, Any], None]] = {
    "size": _size,
    "layers": _layers,
    "samples": _samples,
    "batch": _batch,
}
