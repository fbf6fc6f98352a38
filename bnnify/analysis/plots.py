"""Pictures of a posterior; they need matplotlib."""

__all__ = ["plot_signal_to_noise", "pyplot"]

import os
from typing import Any

import torch

from ..errors import needing
from ..model import BayesianModel
from .pruning import signal_to_noise


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


def plot_signal_to_noise(bnn: BayesianModel, path: str | os.PathLike[str]) -> None:
    """Draw the signal-to-noise ratio of every parameter, and what pruning by it would leave.

    To the left a histogram of ``20·log10(|μ|/σ)`` in decibels for each parameter; to the right, the least ``|μ|/σ``
    that is left after pruning, against the fraction that is pruned.

    References:
        Blundell et al. 2015, "Weight Uncertainty in Neural Networks", figure 5.
    """
    plt = pyplot()
    ratios = {name: ratio.flatten() for name, ratio in signal_to_noise(bnn).items()}
    decibels = {name: 20 * ratio[ratio > 0].log10() for name, ratio in ratios.items()}
    finite = {name: values[values.isfinite()].numpy() for name, values in decibels.items()}
    figure, (histogram, curve) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, values in finite.items():
        if len(values):
            histogram.hist(values, bins=60, histtype="step", density=True, label=name)
    histogram.set(xlabel="signal-to-noise ratio (dB)", ylabel="density")
    if len(finite) <= 12:
        histogram.legend(fontsize="small")
    ordered = torch.cat(list(ratios.values())).sort().values if ratios else torch.zeros(0)
    steps = ordered[:: max(1, len(ordered) // 2000)]
    curve.plot(torch.linspace(0, 1, max(len(steps), 1))[: len(steps)], steps)
    curve.set(xlabel="fraction of the weights pruned", ylabel="least |μ|/σ that is left", yscale="log")
    figure.savefig(path)
    plt.close(figure)
