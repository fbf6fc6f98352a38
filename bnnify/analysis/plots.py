"""Pictures of a posterior; they need matplotlib."""

__all__ = ["plot_signal_to_noise", "pyplot", "save_figure"]

import os
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, needing
from ..model import BayesianModel
from .pruning import signal_to_noise
from .summary import QUANTILES


def pyplot() -> Any:
    """Import matplotlib's pyplot, set up to draw to files.

    Raises:
        MissingLibraryError: It is not installed.
    """
    with needing("matplotlib", "A plot"):
        import matplotlib
        from matplotlib import pyplot
    matplotlib.use("Agg")

    return pyplot


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure into the file that ``path`` names, in the format of its ending, and close it.

    Raises:
        ArgumentError: It cannot be written there, or in such a format.
    """
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ArgumentError(f"Cannot draw `{path}`: {' '.join(str(error).split()).rstrip('.')}.") from error
    finally:
        pyplot().close(figure)


_MOST_ROWS = 60


def plot_signal_to_noise(bnn: BayesianModel, path: str | os.PathLike[str]) -> None:
    """Draw the signal-to-noise ratio of every parameter, and what pruning by it would leave.

    To the left the quantiles of ``20·log10(|μ|/σ)`` in decibels for each parameter, or each module where there are too
    many parameters to be told apart; to the right, the least ``|μ|/σ`` that is left after pruning, against the fraction
    that is pruned.

    References:
        Blundell et al. 2015, "Weight Uncertainty in Neural Networks", figure 5.
    """
    plt = pyplot()
    ratios = {name: ratio.flatten() for name, ratio in signal_to_noise(bnn).items()}
    rows = _grouped(ratios)
    figure, (ranges, curve) = plt.subplots(1, 2, figsize=(12, max(4, 1 + 0.2 * len(rows))), layout="constrained")
    for height, ratio in enumerate(rows.values()):
        decibels = 20 * ratio[(ratio > 0) & ratio.isfinite()].sort().values.log10()
        if len(decibels):
            low, quarter, middle, three, high = (decibels[round(q * (len(decibels) - 1))].item() for q in QUANTILES)
            ranges.plot([low, high], [height, height], color="C0", linewidth=1, label="5 to 95 %" if not height else "")
            ranges.plot(
                [quarter, three], [height, height], color="C0", linewidth=4, label="" if height else "25 to 75 %"
            )
            ranges.plot([middle], [height], "|", color="black", markersize=8, label="" if height else "median")
    ranges.set(xlabel="signal-to-noise ratio 20·log₁₀(|μ|/σ), dB", yticks=range(len(rows)), yticklabels=list(rows))
    ranges.tick_params(axis="y", labelsize="small")
    ranges.invert_yaxis()  # the first layer on top
    ranges.grid(axis="x", alpha=0.3)
    if rows:
        ranges.legend(fontsize="small", ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    ordered = torch.cat(list(ratios.values())).sort().values if ratios else torch.zeros(0, device="cpu")
    fractions = torch.linspace(0, 1, 1001, device=ordered.device)[1:-1]
    if len(ordered):
        curve.plot(fractions, ordered[(fractions * (len(ordered) - 1)).round().long()])
    curve.set(xlabel="fraction of the weights pruned", ylabel="least |μ|/σ that is left", yscale="log", xlim=(0, 1))
    curve.grid(alpha=0.3)
    save_figure(figure, path)


def _grouped(ratios: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put the parameters of a module together, as far down as it takes to have a readable number of rows."""
    depth = max((name.count(".") for name in ratios), default=0) + 1
    while True:
        rows: dict[str, list[Tensor]] = {}
        for name, ratio in ratios.items():
            rows.setdefault(".".join(name.split(".")[:depth]), []).append(ratio)
        if len(rows) <= _MOST_ROWS or depth == 1:
            return {name: torch.cat(found) for name, found in rows.items()}
        depth -= 1
