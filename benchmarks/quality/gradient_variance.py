"""The variance of the gradient against the batch size, for each estimator, in a small network on MNIST."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnnify

from ..harness import report
from ..harness.data import Images, mnist
from ..harness.figure import figure
from ..harness.fit import fit
from ..harness.networks.small_networks import mlp
from ..harness.progress import track
from ..harness.report import Run, Table

ESTIMATORS = ("reparameterization", "flipout", "local")
BATCH_SIZES = (1, 4, 16, 64, 256, 1024)
NOISE, TOTAL = "noise alone", "noise and batch"
MEANS, RHO = "means", "ρ"

Variances = dict[str, dict[str, float]]
"""First by what is random, then by what the gradient is with respect to."""


def main() -> None:
    options = _options()
    run = Run(options, ["torch"])
    train = mnist(train=True, data=options.data)
    torch.manual_seed(0)
    network = trained(train, options.steps)
    results: dict[str, dict[str, Variances]] = {}
    for estimator in ESTIMATORS:
        bnn = bnnify.convert(network, estimator=estimator, posterior_std=bnnify.Relative(0.2, full_width=32))
        results[estimator] = {
            str(size): variances(bnn, train, size, max(options.batches, options.images // size))
            for size in track(BATCH_SIZES, estimator)
        }
        run.record(results)
    if options.plot:
        plot(results, options.plot)
    headings = ["batch size", *(f"{of}\n{estimator}" for of in (MEANS, RHO) for estimator in ESTIMATORS)]
    rows: list[list[str]] = []
    for what in (NOISE, TOTAL):
        rows.append([what])
        for size in map(str, BATCH_SIZES):
            found = [results[estimator][size][what][of] for of in (MEANS, RHO) for estimator in ESTIMATORS]
            rows.append([size, *(f"{value:.2e}" for value in found)])
    run.show(Table("Variance of the gradient, summed over weights", headings, rows, names=0))


def trained(train: Images, steps: int) -> nn.Module:
    """Two hidden layers of 100 units, in the middle of their training, where the gradient still matters."""
    network = mlp(width=100, depth=2)
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    indices = (torch.randint(len(train.labels), (128,)) for _ in range(steps))
    fit(network, optimizer, train, indices, prepare=_inputs, steps=steps)
    return network


def variances(bnn: bnnify.BayesianModel, train: Images, size: int, batches: int) -> Variances:
    """The variance of the gradient of the mean NLL, summed over weights.

    Each batch has two draws. Half the square of their difference has the variance of the noise, given the batch, as
    its expectation; the variance of the first draw over batches is that of noise and batch together.
    """
    named = dict(bnn.module.named_parameters())
    groups = {
        MEANS: [named[name] for name in named if f"{name}_rho" in named],
        RHO: [named[name] for name in named if name.endswith("_rho")],
    }
    noise = dict.fromkeys(groups, 0.0)
    sums: dict[str, Any] = dict.fromkeys(groups, 0.0)
    squares: dict[str, Any] = dict.fromkeys(groups, 0.0)
    torch.manual_seed(size)  # the same batches for every estimator, to begin with
    chosen = [torch.randint(len(train.labels), (size,)) for _ in range(batches)]
    for index in chosen:
        inputs, labels = _inputs(train.pixels[index]), train.labels[index]
        first, second = (_gradients(bnn, groups, inputs, labels) for _ in range(2))
        for name in groups:
            noise[name] += (first[name] - second[name]).square().sum().item() / 2
            sums[name] += first[name].double()
            squares[name] += first[name].double().square()
    total = {name: ((squares[name] - sums[name] ** 2 / batches).sum() / (batches - 1)).item() for name in groups}
    return {NOISE: {name: value / batches for name, value in noise.items()}, TOTAL: total}


def _gradients(
    bnn: bnnify.BayesianModel, groups: dict[str, list[nn.Parameter]], inputs: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """The gradient of the NLL alone: that of the KL is the same in every draw and for every batch."""
    loss = F.cross_entropy(bnn(inputs)[0], labels)
    found = torch.autograd.grad(loss, [parameter for group in groups.values() for parameter in group])
    flat = iter(gradient.flatten() for gradient in found)
    return {name: torch.cat([next(flat) for _ in group]) for name, group in groups.items()}


def plot(results: dict[str, dict[str, Variances]], path: Path) -> None:
    with figure(path, columns=2, size=(8, 4)) as (whole, panels):
        for panel, of in zip(panels, (MEANS, RHO), strict=True):
            for number, (estimator, by_size) in enumerate(results.items()):
                for what, style in ((NOISE, "o-"), (TOTAL, ":")):
                    heights = [by_size[str(size)][what][of] for size in BATCH_SIZES]
                    label = f"{estimator}, {what}"
                    panel.loglog(BATCH_SIZES, heights, style, color=f"C{number}", markersize=4, label=label)
            panel.set(title=f"gradient with respect to {of}", xlabel="batch size", xticks=BATCH_SIZES)
            panel.set_xticks(BATCH_SIZES, labels=map(str, BATCH_SIZES))
            panel.minorticks_off()
        panels[0].set_ylabel("variance, summed over weights")
        whole.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)


def _inputs(pixels: Tensor) -> Tensor:
    return pixels.float() / 255


def _options() -> argparse.Namespace:
    parser = report.parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, help="folder of archives with MNIST; else torchvision downloads it")
    add("--steps", type=int, default=300, help="batches of 128 images in the training of the network")
    add("--batches", type=int, default=60, help="batches of each size, at least")
    add("--images", type=int, default=2000, help="images in the batches of each size, at least")
    add("--plot", type=Path, help="where to draw the figure, such as docs/figures/gradient_variance.png")
    return parser.parse_args()


if __name__ == "__main__":
    main()
