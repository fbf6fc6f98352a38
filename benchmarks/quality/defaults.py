"""Which σ should a posterior start with? Small networks of many kinds are converted and judged as they are."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

import bnnify

from ..harness import report
from ..harness.evaluation import evaluate, fit_temperature, logits
from ..harness.networks.small_networks import NETWORKS, Network, trained
from ..harness.report import Run, Table, track

BATCH_SIZE = 100
FITTING = 500
"""Images that are used only to fit a fraction."""

Scores = dict[str, float]
"""Accuracy in percent, nll in nats and ece, of one predictive distribution."""


def main() -> None:
    options = _options()
    run = Run(options, ("bnnify", "torch", "torchmetrics"))
    # The published networks are among the archives; without those, they are left out.
    networks = [network for network in NETWORKS if options.data or not network.checkpoint]
    results: dict[str, dict[str, Any]] = {}
    for network in networks[: 1 if options.quick else None]:
        results[network.name] = sweep(network, options)
        run.record(results)
    run.show(table(results, options))


def sweep(network: Network, options: argparse.Namespace) -> dict[str, Any]:
    """The scores of the network as it is, and for each setting and number of samples."""
    model = trained(network, options.data, options.cache)
    inputs, labels = network.images(False, options.data, options.images + FITTING)
    rule = fitted(model, inputs[:FITTING], labels[:FITTING])
    inputs, labels = inputs[FITTING:], labels[FITTING:]
    found = logits(model, inputs, BATCH_SIZE)
    result = {
        "temperature": fit_temperature(found, labels),
        "fitted fraction": rule.fraction,
        "deterministic": _scores(found.softmax(-1), labels),
    }
    settings = SETTINGS | {FITTED: {"posterior_std": rule}}
    for name, setting in track(settings.items(), f"Sweeping {network.name}"):
        probabilities = _sample(model, inputs, max(options.samples), **setting)
        result[name] = {str(count): _scores(probabilities[:count].mean(0), labels) for count in options.samples}
    return result


def fitted(model: nn.Module, inputs: Tensor, labels: Tensor) -> bnnify.Relative:
    """The default rule with the fraction of the lowest NLL on these images: what one can do who has some to spare."""

    def nll(rule: bnnify.Relative) -> float:
        return _scores(_sample(model, inputs, 10, posterior_std=rule).mean(0), labels)["nll"]

    return min((bnnify.Relative(fraction, full_width=32) for fraction in FRACTIONS), key=nll)


@dataclass(frozen=True)
class WeightsOnly:
    """σ = fraction · rms(w) for weights, none for biases."""

    fraction: float

    def __call__(self, weight: Tensor, scale: float) -> Tensor:
        return bnnify.Relative(self.fraction)(weight, scale) if weight.ndim > 1 else torch.zeros(())


@dataclass(frozen=True)
class OfFanIn:
    """σ = fraction / √fan_in: the scale of the initialisation, whatever training made of it."""

    fraction: float

    def __call__(self, weight: Tensor, scale: float) -> Tensor:
        return torch.tensor(self.fraction * math.sqrt(3) * scale)  # bnnify's scale is 1/√(3·fan_in)


# What `bnnify.convert` is told, if anything.
SETTINGS: dict[str, dict[str, Any]] = {
    "bnnify's default": {},
    "0.1 rms, full width 32": {"posterior_std": bnnify.Relative(0.1, full_width=32)},
    "0.15 rms, full width 32": {"posterior_std": bnnify.Relative(0.15, full_width=32)},
    "0.25 rms, full width 32": {"posterior_std": bnnify.Relative(0.25, full_width=32)},
    "0.1 rms": {"posterior_std": bnnify.Relative(0.1)},
    "0.2 rms": {"posterior_std": bnnify.Relative(0.2)},
    "0.2 rms, no biases": {"posterior_std": WeightsOnly(0.2)},
    "0.3 rms": {"posterior_std": bnnify.Relative(0.3)},
    "0.1 / sqrt(fan-in)": {"posterior_std": OfFanIn(0.1)},
    "0.2 |w| (MOPED)": {"posterior_std": bnnify.Moped(0.2)},
    "0.0486 (rho = -3)": {"posterior_std": 0.0486},
}
FITTED = "fitted on 500 other images"
FRACTIONS = (0.025, 0.05, 0.1, 0.15, 0.2, 0.3)


def table(results: dict[str, dict[str, Any]], options: argparse.Namespace) -> Table:
    """One block for each network, then the mean and the worst of all changes against the deterministic networks."""
    samples = options.samples
    rows: list[list[str]] = []
    for network, result in results.items():
        rows.append([f"{network}: temperature {result['temperature']:.2f}, fitted {result['fitted fraction']}"])
        rows.append(["deterministic", *_cells([result["deterministic"]] * len(samples))])
        rows += [[name, *_cells([result[name][str(count)] for count in samples])] for name in (*SETTINGS, FITTED)]
    for title, summary in (("Mean change", _mean_change), ("Worst change", _worst_change)):
        rows.append([title])
        for name in (*SETTINGS, FITTED):
            changes = [summary([_change(result, name, count) for result in results.values()]) for count in samples]
            rows.append([name, *_cells(changes, sign="+")])
    scores = [f"{score}\n{count} samples" for count in samples for score in ("accuracy", "NLL", "ECE")]
    title = f"As converted, without training; {options.images} unseen images for each network"
    return Table(title, ["posterior std", *scores], rows)


def _sample(model: nn.Module, inputs: Tensor, num_samples: int, **setting: Any) -> Tensor:
    """Class probabilities of networks from the posterior, shape (num_samples, N, classes)."""
    bnn = bnnify.convert(model, **setting)
    # The same noise, but for its scale, under every setting: the differences are then the settings' own.
    torch.manual_seed(1)
    with torch.no_grad():
        outputs = [bnn.sample(batch, num_samples=num_samples) for batch in inputs.split(BATCH_SIZE)]
    return torch.cat(outputs, dim=1).softmax(-1)


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


def _options() -> argparse.Namespace:
    parser = report.parser(__doc__)
    parser.set_defaults(threads=2)
    add = parser.add_argument
    add("--data", type=Path, help="folder of archives and checkpoints; else torchvision downloads")
    add("--cache", type=Path, help="folder where trained networks are kept and found again")
    add("--images", type=int, default=2000, help="unseen images for each network")
    add("--samples", type=int, nargs="+", default=[10], help="networks drawn")
    add("--quick", action="store_true", help="one small network and 500 images, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.images = min(options.images, 500)
    return options


if __name__ == "__main__":
    main()
