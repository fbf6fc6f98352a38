"""Which standard deviation should a posterior start with? Small networks of many kinds, converted and not trained."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from evaluation import evaluate, fit_temperature
from rich.console import Console
from rich.progress import track
from rich.table import Table
from small_networks import NETWORKS, Network, trained
from torch import Tensor

import bnnify

BATCH_SIZE = 250

Scores = dict[str, float]
"""Accuracy in percent, nll in nats and ece, of one predictive distribution."""


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    # The published networks are among the archives; without those, they are left out.
    networks = [network for network in NETWORKS if options.data or not network.checkpoint]
    start = time.perf_counter()
    results = {network.name: sweep(network, options) for network in networks[: 1 if options.quick else None]}
    report = {
        "environment": _environment(),
        "images": options.images,
        "samples": options.samples,
        "minutes": (time.perf_counter() - start) / 60,
        "results": results,
    }
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n")
    Console(width=120).print(table(report))


def sweep(network: Network, options: argparse.Namespace) -> dict[str, Any]:
    """The scores of the network as it is, and for each setting and number of samples."""
    model = trained(network, options.data, options.cache)
    inputs, labels = network.images(False, options.data, options.images)
    with torch.no_grad():
        plain = torch.cat([model(batch) for batch in inputs.split(BATCH_SIZE)])
    result = {"temperature": fit_temperature(plain, labels), "deterministic": _scores(plain.softmax(-1), labels)}
    for setting, posterior_std in track(SETTINGS.items(), f"Sweeping {network.name}", transient=True):
        bnn = bnnify.convert(model, **posterior_std)
        # The same noise, but for its scale, under every setting: the differences are then the settings' own.
        torch.manual_seed(1)
        with torch.no_grad():
            logits = [bnn.sample(batch, num_samples=max(options.samples)) for batch in inputs.split(BATCH_SIZE)]
        probabilities = torch.cat(logits, dim=1).softmax(-1)
        result[setting] = {str(count): _scores(probabilities[:count].mean(0), labels) for count in options.samples}
    return result


@dataclass(frozen=True)
class OfRms:
    """σ = fraction · rms(w), one σ for the whole tensor, whatever its width."""

    fraction: float
    biases: bool = True

    def __call__(self, weight: Tensor, scale: float) -> Tensor:
        if weight.ndim < 2 and not self.biases:
            return torch.zeros(())
        rms = weight.square().mean().sqrt()
        return self.fraction * (rms if rms > 0 else torch.tensor(scale))


@dataclass(frozen=True)
class OfRmsAndWidth:
    """σ = fraction · rms(w) · min(1, √(units / enough)): less for a layer of few units, whose errors average less."""

    fraction: float
    enough: int = 32

    def __call__(self, weight: Tensor, scale: float) -> Tensor:
        return OfRms(self.fraction * min(1.0, math.sqrt(len(weight) / self.enough)))(weight, scale)


@dataclass(frozen=True)
class OfFanIn:
    """σ = fraction / √fan_in: the scale of the initialisation, whatever training made of it."""

    fraction: float

    def __call__(self, weight: Tensor, scale: float) -> Tensor:
        return torch.tensor(self.fraction * math.sqrt(3) * scale)  # bnnify's scale is 1/√(3·fan_in)


# What `bnnify.convert` is told; the first is the default.
SETTINGS: dict[str, dict[str, Any]] = {
    "bnnify.convert(model)": {},
    "0.1 rms": {"posterior_std": OfRms(0.1)},
    "0.15 rms": {"posterior_std": OfRms(0.15)},
    "0.2 rms": {"posterior_std": OfRms(0.2)},
    "0.2 rms, no biases": {"posterior_std": OfRms(0.2, biases=False)},
    "0.3 rms": {"posterior_std": OfRms(0.3)},
    "0.15 rms, width 32": {"posterior_std": OfRmsAndWidth(0.15)},
    "0.2 rms, width 32": {"posterior_std": OfRmsAndWidth(0.2)},
    "0.25 rms, width 32": {"posterior_std": OfRmsAndWidth(0.25)},
    "0.2 rms, width 16": {"posterior_std": OfRmsAndWidth(0.2, enough=16)},
    "0.1 / sqrt(fan-in)": {"posterior_std": OfFanIn(0.1)},
    "0.2 |w| (MOPED)": {"posterior_std": bnnify.Moped(0.2)},
    "0.0486 (rho = -3)": {"posterior_std": 0.0486},
}


def table(report: dict[str, Any]) -> Table:
    """One block for each network, then the mean and the worst of all changes against the deterministic networks."""
    samples, results = report["samples"], report["results"]
    environment = ", ".join(f"{name} {value}" for name, value in report["environment"].items())
    grid = Table(
        title=f"As converted, without training; {report['images']} unseen images for each network",
        caption=f"{environment}; {report['minutes']:.0f} minutes",
    )
    grid.add_column("posterior std")
    for count in samples:
        for score in ("accuracy", "NLL", "ECE"):
            grid.add_column(f"{score}\n{count} samples", justify="right")
    for network, result in results.items():
        grid.add_section()
        grid.add_row(f"[bold]{network}[/] (T = {result['temperature']:.2f})")
        grid.add_row("deterministic", *_cells([result["deterministic"]] * len(samples)))
        for setting in SETTINGS:
            grid.add_row(setting, *_cells([result[setting][str(count)] for count in samples]))
    for title, summary in (("Mean change", _mean_change), ("Worst change", _worst_change)):
        grid.add_section()
        grid.add_row(f"[bold]{title}[/]")
        for setting in SETTINGS:
            changes = [summary([_change(result, setting, count) for result in results.values()]) for count in samples]
            grid.add_row(setting, *_cells(changes, sign="+"))
    return grid


def _scores(probabilities: Tensor, labels: Tensor) -> Scores:
    metrics = evaluate(probabilities, labels, resamples=1)  # the interval, which costs the most, is not shown
    return {"accuracy": 100 * metrics.accuracy, "nll": metrics.nll, "ece": metrics.ece}


def _change(result: dict[str, Any], setting: str, count: int) -> Scores:
    return {name: score - result["deterministic"][name] for name, score in result[setting][str(count)].items()}


def _mean_change(changes: list[Scores]) -> Scores:
    return {name: fmean(change[name] for change in changes) for name in changes[0]}


def _worst_change(changes: list[Scores]) -> Scores:
    return {name: (min if name == "accuracy" else max)(change[name] for change in changes) for name in changes[0]}


def _cells(scores: list[Scores], sign: str = "") -> list[str]:
    formats = {"accuracy": f"{sign}.1f", "nll": f"{sign}.3f", "ece": f"{sign}.3f"}
    return [format(score[name], form) for score in scores for name, form in formats.items()]


def _environment() -> dict[str, str]:
    packages = {name: version(name) for name in ("bnnify", "torch", "torchmetrics")}
    machine = f"{platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores"
    return {"Python": platform.python_version(), **packages, "on": machine}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of archives and checkpoints; default: torchvision downloads")
    parser.add_argument("--cache", type=Path, help="folder where trained networks are kept and found again")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--images", type=int, default=2000, help="unseen images for each network (default: 2000)")
    parser.add_argument("--samples", type=int, nargs="+", default=[10, 32], help="networks drawn (default: 10 32)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--quick", action="store_true", help="one small network and 500 images, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.images = min(options.images, 500)
    return options


if __name__ == "__main__":
    main()
