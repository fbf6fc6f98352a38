"""What comes of the experiments of Blundell et al. 2015: tables beside the paper's figures, and the paper's plots."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import bnnify

from ..harness.figure import figure
from ..harness.report import Table

FRACTIONS = (0.0, 0.5, 0.75, 0.95, 0.98)
MIXTURE = "BBB, scale mixture"

# Test errors in percent after 600 epochs, from the paper's tables 1 and 2.
PAPER = {
    "SGD": {400: 1.83, 800: 1.84, 1200: 1.88},
    "dropout": {400: 1.51, 800: 1.33, 1200: 1.36},
    "BBB, Gaussian": {400: 1.82, 800: 1.99, 1200: 2.04},
    MIXTURE: {400: 1.36, 800: 1.34, 1200: 1.32},
}
PAPER_PRUNED = dict(zip(FRACTIONS, (1.24, 1.24, 1.24, 1.29, 1.39), strict=True))


@dataclass(frozen=True)
class Result:
    """What one network scores; errors in percent."""

    method: str
    width: int
    epochs: int
    nll: float
    """Of the training batches in the last epoch, with the noise that there is in training."""
    kl: float
    """KL/N in nats, in the last epoch."""
    validation_error: float
    """Of the posterior mean, like the next one."""
    test_error: float
    ensemble_error: float | None


@dataclass(frozen=True)
class Pruned:
    """What is left of a network after pruning; errors in percent."""

    fraction: float
    weights: int
    test_error: float
    ensemble_error: float


def table(results: list[Result]) -> Table:
    headings = ["network", "epochs", "train NLL", "KL/N", "validation", "test", "test, ensemble", "paper, 600 epochs"]
    rows = [
        [
            f"{result.method}, 2×{result.width}",
            str(result.epochs),
            f"{result.nll:.4f}",
            "" if result.ensemble_error is None else f"{result.kl:.2f}",
            f"{result.validation_error:.2f}",
            f"{result.test_error:.2f}",
            "" if result.ensemble_error is None else f"{result.ensemble_error:.2f}",
            str(PAPER[result.method].get(result.width, "")),
        ]
        for result in results
    ]
    return Table("MNIST: errors in percent", headings, rows)


def pruning_table(width: int, pruned: list[Pruned]) -> Table:
    rows = [
        [
            f"{100 * row.fraction:.0f}",
            f"{row.weights:,}",
            f"{row.test_error:.2f}",
            f"{row.ensemble_error:.2f}",
            f"{PAPER_PRUNED[row.fraction]:.2f}",
        ]
        for row in pruned
    ]
    headings = ["removed %", "weights left", "test", "test, ensemble", "paper, 600 epochs"]
    return Table(f"{MIXTURE}, 2×{width}: test error in percent after pruning by |μ|/σ", headings, rows, names=0)


def plot(networks: dict[str, nn.Module], folder: Path) -> None:
    """Writes the paper's figure 3, of all networks, and its figure 5, of those that have a posterior."""
    weights(networks, folder / "blundell_weights.png")
    bayesian = {name: network for name, network in networks.items() if isinstance(network, bnnify.BayesianModel)}
    if bayesian:
        signal_to_noise(bayesian, folder / "blundell_signal_to_noise.png")


@torch.no_grad()
def weights(networks: dict[str, nn.Module], path: Path) -> None:
    """Histograms of the trained weights; of a posterior, one sample of each weight."""
    with figure(path, size=(5.5, 3.4)) as (_, (panel,)):
        for name, network in networks.items():
            if isinstance(network, bnnify.BayesianModel):
                with network.draw():
                    values = _weights(network.module)
            else:
                values = _weights(network)
            shares, edges = _histogram(values, low=-0.2, high=0.2)
            panel.stairs(shares / edges.diff(), edges, label=name)
        panel.set(xlabel="weight", ylabel="density", yscale="log")
        panel.legend(frameon=False)


@torch.no_grad()
def signal_to_noise(networks: dict[str, bnnify.BayesianModel], path: Path) -> None:
    """Density and cumulative distribution of the signal-to-noise ratio over all weights."""
    with figure(path, columns=2) as (_, (density, cumulative)):
        for name, network in networks.items():
            ratios = torch.cat([ratio.flatten().cpu() for ratio in bnnify.signal_to_noise(network).values()])
            decibels = (10 * ratios.log10()).clamp_min(-50.0)  # a ratio of zero counts in the first bin
            shares, edges = _histogram(decibels, low=-50.0, high=30.0)
            density.stairs(shares / edges.diff(), edges, label=name)
            cumulative.plot(edges[1:], shares.cumsum(0))
        density.set(xlabel="10 log₁₀ |μ|/σ in dB", ylabel="density")
        density.legend(frameon=False)
        cumulative.set(xlabel="10 log₁₀ |μ|/σ in dB", ylabel="share of weights below")


def _weights(network: nn.Module) -> Tensor:
    return torch.cat([layer.weight.flatten().cpu() for layer in network if isinstance(layer, nn.Linear)])


def _histogram(values: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """The share that each bin has of all values, also of those outside, and the edges."""
    counts, edges = torch.histogram(values.float(), bins=120, range=(low, high))
    return counts / len(values), edges
