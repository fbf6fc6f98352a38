"""Regression in one dimension with credible bands, as in Blundell et al. 2015, section 5.2."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnnify

from ..harness import report
from ..harness.figure import figure
from ..harness.fit import fit
from ..harness.report import Run, Table

NOISE_STD = 0.02
POINTS = 1024
WIDTH = 100


def main() -> None:
    options = _options()
    run = Run(options, ["torch"])
    torch.manual_seed(options.seed)
    inputs, targets = curve(POINTS)
    plain = trained(network(), inputs, targets, options.steps)
    bnn = bnnify.convert(
        network(),
        prior=bnnify.Gaussian(std=options.prior_std),
        posterior_std=options.posterior_std,
        estimator="local",
    )
    bnn = trained(bnn, inputs, targets, options.steps)
    grid = torch.linspace(-0.4, 1.2, 321)[:, None]
    with torch.no_grad():
        line = plain(grid)[:, 0]
        lines = bnn.sample(grid, num_samples=options.samples)[..., 0]
    if options.plot:
        plot(inputs, targets, grid[:, 0], line, lines, options.plot)
    found = widths(grid[:, 0], lines)
    run.record(found)
    rows = [[f"{x:.2f}", f"{quartiles:.3f}", f"{credible:.3f}"] for x, quartiles, credible in found]
    run.show(Table("Width of the bands of the network's output", ["x", "interquartile", "95 %"], rows, names=0))


def curve(points: int) -> tuple[Tensor, Tensor]:
    """y = x + 0.3 sin 2π(x + ε) + 0.3 sin 4π(x + ε) + ε for x between 0 and 0.5."""
    x = 0.5 * torch.rand(points, 1)
    noise = NOISE_STD * torch.randn(points, 1)
    waves = torch.sin(2 * math.pi * (x + noise)) + torch.sin(4 * math.pi * (x + noise))
    return x, x + 0.3 * waves + noise


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(1, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))


def trained(model: nn.Module, inputs: Tensor, targets: Tensor, steps: int) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), 3e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    # ε moves the curve sideways too, where it is steep: the spread about the curve is wider than ε itself.
    variance = torch.tensor((3 * NOISE_STD) ** 2)

    def loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        output, kl = model(inputs), torch.zeros(())
        if isinstance(model, bnnify.BayesianModel):
            output, kl = output
        nll = F.gaussian_nll_loss(output, targets, variance.expand_as(output), full=True)
        return bnnify.elbo(nll, kl, num_data=POINTS, beta=bnnify.linear_warmup(schedule.last_epoch, steps // 2))

    indices = (torch.randint(len(inputs), (128,)) for _ in range(steps))
    fit(model, optimizer, (inputs, targets), indices, loss, schedule=schedule, steps=steps)
    return model


def plot(inputs: Tensor, targets: Tensor, grid: Tensor, line: Tensor, lines: Tensor, path: Path) -> None:
    with figure(path, columns=2, sharey=True) as (_, panels):
        for panel, title in zip(panels, ("Bayes by Backprop", "plain network"), strict=True):
            panel.plot(inputs[::8, 0], targets[::8, 0], "kx", markersize=3, alpha=0.5, label="training data")
            panel.set(title=title, xlabel="x", xlim=(-0.4, 1.2), ylim=(-1.0, 1.5))
        for low, high, label in ((0.025, 0.975, "95 %"), (0.25, 0.75, "interquartile")):
            bounds = lines.quantile(torch.tensor([low, high]), 0)
            panels[0].fill_between(grid, *bounds, color="C0", alpha=0.3, linewidth=0, label=label)
        panels[0].plot(grid, lines.median(0).values, "C3", label="median")
        panels[1].plot(grid, line, "C3", label="prediction")
        for panel in panels:
            panel.legend(frameon=False, loc="lower right", fontsize=8)
        panels[0].set_ylabel("y")


def widths(grid: Tensor, lines: Tensor) -> list[tuple[float, float, float]]:
    """How wide the interquartile band and that of 95 % are, inside of the data and ever farther out."""
    quartiles, credible = ((lines.quantile(1 - tail, 0) - lines.quantile(tail, 0)) for tail in (0.25, 0.025))
    found = []
    for x in (-0.4, -0.2, 0.0, 0.25, 0.5, 0.7, 0.9, 1.2):
        at = (grid - x).abs().argmin()
        found.append((x, quartiles[at].item(), credible[at].item()))
    return found


def _options() -> argparse.Namespace:
    parser = report.parser(__doc__)
    add = parser.add_argument
    add("--steps", type=int, default=4_000, help="batches of 128 points")
    add("--prior-std", type=float, default=0.3)
    add("--posterior-std", type=float, default=0.02, help="where σ starts")
    add("--samples", type=int, default=500, help="draws of the weights behind the bands")
    add("--seed", type=int, default=0)
    add("--plot", type=Path, help="where to write the figure")
    return parser.parse_args()


if __name__ == "__main__":
    main()
