"""The pictures of a report; they need matplotlib."""

__all__ = ["plot_report"]

import os
from collections.abc import Callable, Mapping
from typing import Any

from .plots import pyplot, save_figure


def plot_report(curves: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw the curves that :func:`~bnnify.analysis.curves.curves_of` makes, one panel each.

    Raises:
        ArgumentError: The file cannot be written.
        MissingLibraryError: matplotlib is not installed.
    """
    plt = pyplot()
    panels: list[tuple[Callable[..., None], Any, str]] = []
    drawn = {"reliability": _reliability, "risk_coverage": _risk_coverage, "coverage": _coverage}
    panels += [(draw, curves[name], "") for name, draw in drawn.items() if name in curves]
    panels += [(_histogram, sides, score) for score, sides in curves.get("histograms", {}).items()]
    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.8 * columns, 3.8 * lines), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (draw, found, title) in zip(axes.flat, panels, strict=False):
        draw(axis, found, title)
        axis.legend(fontsize="small")
    save_figure(figure, path)


def _reliability(axis: Any, rows: Mapping[str, Any], title: str) -> None:
    axis.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for row, (confidence, accuracy, share) in rows.items():
        kept = [(x, y, 300 * some) for x, y, some in zip(confidence, accuracy, share, strict=True) if some]
        x, y, sizes = zip(*kept, strict=True)
        line = axis.plot(x, y, linewidth=1, label=row)[0]
        axis.scatter(x, y, s=sizes, color=line.get_color(), alpha=0.7)  # as large as the share of data in the bin
    axis.set(xlabel="confidence", ylabel="accuracy", title="reliability", xlim=(0, 1), ylim=(0, 1))


def _risk_coverage(axis: Any, rows: Mapping[str, Any], title: str) -> None:
    for row, (share, risk) in rows.items():
        axis.plot(share, risk, label=row)
    axis.set(xlabel="share of the data accepted, the surest first", ylabel="share of errors among them")
    axis.set(title="risk and coverage", xlim=(0, 1))
    axis.set_ylim(bottom=0)


def _coverage(axis: Any, rows: Mapping[str, Any], title: str) -> None:
    axis.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for row, (levels, covered) in rows.items():
        axis.plot(levels, covered, marker="o", markersize=3, label=row)
    axis.set(xlabel="level of the interval", ylabel="share of the data in it", title="coverage of intervals")
    axis.set(xlim=(0, 1), ylim=(0, 1))


def _histogram(axis: Any, sides: Mapping[str, Any], title: str) -> None:
    for side, (edges, density) in sides.items():
        axis.stairs(density, edges, fill=True, alpha=0.5, label=side)
    axis.set(xlabel=title if "std" in title else f"{title} (nats)", ylabel="density", title=title)
