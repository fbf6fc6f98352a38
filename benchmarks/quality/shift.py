"""What does sampling buy that a temperature cannot? CIFAR-10 networks under corruptions and on other images."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_auroc

import bnnify

from ..harness import report
from ..harness.data import Images, cifar10, cifar10_jpeg, fashion_mnist
from ..harness.evaluation import calibration_error, fit_temperature
from ..harness.networks import cifar_resnet
from ..harness.networks.larger_networks import LARGER_NETWORKS
from ..harness.networks.small_networks import NETWORKS, trained
from ..harness.progress import track
from ..harness.report import Run, Table
from ..harness.shifted_images import as_cifar, corrupted, jpeg_places, noise

FITTING = 500
"""Clean images, unseen in training, for the temperature and for σ."""

SEVERITIES = (1, 3, 5)
MEASURES = ("max probability", "entropy", "mutual information", "energy")

Predict = Callable[[Tensor], dict[str, Tensor]]
"""From inputs to probabilities, and to a score of each measure that is high for odd images."""


def main() -> None:
    options = _options()
    run = Run(options, ("bnnify", "torch", "torchmetrics", "imagecorruptions"))
    clean = cifar10(False, options.data).take(slice(1000))
    fitting, test = clean.take(slice(0, None, 2)), clean.take(slice(1, None, 2)).take(slice(options.images))
    sets = {
        "clean": [test],
        "JPEG": [cifar10_jpeg(options.data).take(jpeg_places(clean.labels)[1::2][: options.images])],
    }
    sets |= {f"severity {severity}": [part for _, part in corrupted(test, severity)] for severity in SEVERITIES}
    odd = {
        "Fashion-MNIST": as_cifar(fashion_mnist(False, options.data), options.images),
        "noise": noise(options.images),
    }
    results: dict[str, dict[str, Any]] = {}
    for name, model, inputs in networks(options):
        if not any(part in name for part in options.networks):
            continue
        results[name] = {}
        for row, predict in track(rows(model, inputs(fitting), fitting.labels, options.samples), name):
            results[name][row] = measure(predict, inputs, sets, odd)
            run.record(results)
    run.show(*tables(results))


def networks(options: argparse.Namespace) -> Iterator[tuple[str, nn.Module, Callable[[Images], Tensor]]]:
    """The networks for CIFAR-10, with what makes their inputs of images."""
    yield (
        "published ResNet-20",
        cifar_resnet.pretrained(options.data),
        lambda images: cifar_resnet.inputs(images.pixels),
    )
    for network in (*LARGER_NETWORKS, *NETWORKS):
        if network.data is cifar10:
            yield network.name, trained(network, options.data, options.cache), network.inputs


def rows(model: nn.Module, x: Tensor, y: Tensor, samples: int) -> Iterator[tuple[str, Predict]]:
    """Ways to predict with a network, of which some are fitted to clean images."""
    batches = list(zip(x.split(100), y.split(100), strict=True))
    with torch.no_grad():
        found = torch.cat([model(batch) for batch, _ in batches])
    yield "deterministic", lambda x: _of_logits(model(x)[None])
    temperature = fit_temperature(found, y)
    yield f"temperature {temperature:.2f}, labels", lambda x: _of_logits(model(x)[None] / temperature)
    rule = bnnify.ResponseStd(list(x.split(100)), 0.1)
    makers = {
        "default": lambda: bnnify.convert(model),
        "ResponseStd(0.1)": lambda: bnnify.convert(model, posterior_std=rule),
        "ResponseStd, no labels": lambda: _tuned(model, rule, batches, False),
        "ResponseStd, labels": lambda: _tuned(model, rule, batches, True),
    }
    for name, make in makers.items():
        bnn = make()

        def sampled(x: Tensor, bnn: bnnify.BayesianModel = bnn) -> dict[str, Tensor]:
            torch.manual_seed(1)
            return _of_logits(bnn.sample(x, num_samples=samples))

        yield name, sampled


def _tuned(model: nn.Module, rule: Any, batches: list[tuple[Tensor, Tensor]], labels: bool) -> bnnify.BayesianModel:
    bnn = bnnify.convert(model, posterior_std=rule)
    bnnify.tune_std(bnn, batches, likelihood="logits", labels=labels)
    return bnn


def _of_logits(logits: Tensor) -> dict[str, Tensor]:
    """What follows from logits of several networks, shape (K, N, classes)."""
    each = logits.softmax(-1)
    mean = each.mean(0)
    entropy = torch.special.entr(mean).sum(-1)
    return {
        "probabilities": mean,
        "max probability": -mean.amax(-1),
        "entropy": entropy,
        "mutual information": entropy - torch.special.entr(each).sum(-1).mean(0),
        "energy": -logits.logsumexp(-1).mean(0),
    }


@torch.no_grad()
def measure(
    predict: Predict, inputs: Callable[[Images], Tensor], sets: dict[str, list[Images]], odd: dict[str, Images]
) -> dict[str, Any]:
    """Accuracy, NLL and ECE on each set, and how well each measure tells images of other kinds from the clean ones."""
    found: dict[str, Any] = {}
    for name, parts in sets.items():
        scores = []
        for part in parts:
            probabilities = _over(predict, inputs(part))["probabilities"].double().clamp_min(1e-300)
            accuracy = 100 * (probabilities.argmax(1) == part.labels).double().mean().item()
            nll = F.nll_loss(probabilities.log(), part.labels).item()
            scores.append((accuracy, nll, calibration_error(probabilities, part.labels)))
        found[name] = dict(zip(("accuracy", "nll", "ece"), map(fmean, zip(*scores, strict=True)), strict=True))
    usual = _over(predict, inputs(sets["clean"][0]))
    for name, images in odd.items():
        unusual = _over(predict, inputs(images))
        for each in MEASURES:
            scores_in, scores_out = usual[each].double(), unusual[each].double()
            if scores_in.abs().max() < 1e-6:  # one network has no mutual information
                continue
            labels = torch.cat([torch.zeros(len(scores_in)), torch.ones(len(scores_out))]).long()
            both = torch.cat([scores_in, scores_out])
            both = (both - both.min()) / (both.max() - both.min())  # else the metric takes them for logits
            threshold = scores_out.quantile(0.05)
            found[f"{name}, {each}"] = {
                "auroc": 100 * binary_auroc(both, labels).item(),
                "fpr95": 100 * (scores_in >= threshold).double().mean().item(),
            }
    return found


def _over(predict: Predict, x: Tensor) -> dict[str, Tensor]:
    parts = [predict(batch) for batch in x.split(100)]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def tables(results: dict[str, dict[str, Any]]) -> list[Table]:
    """One table of scores under shift, one of how well images of other kinds are told."""
    shifted, told = [], []
    for network, by_row in results.items():
        shifted.append([network])
        told.append([network])
        sets = [name for name in next(iter(by_row.values())) if "," not in name]
        pairs = [name for name in by_row["default"] if "," in name]
        for row, found in by_row.items():
            cells = [found[name] for name in sets]
            shifted.append([row, *(f"{c['accuracy']:.1f} / {c['nll']:.3f} / {c['ece']:.3f}" for c in cells)])
            scores = [found.get(name) for name in pairs]
            told.append([row, *(f"{c['auroc']:.1f} / {c['fpr95']:.1f}" if c else "" for c in scores)])
    return [
        Table("Accuracy % / NLL / ECE, means over corruptions", ["network", *sets], shifted),
        Table("AUROC % / FPR at 95 % TPR, %, against the clean images", ["network", *pairs], told),
    ]


def _options() -> argparse.Namespace:
    parser = report.parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of archives and checkpoints")
    add("--cache", type=Path, help="folder where trained networks are kept and found again")
    add("--networks", nargs="+", default=["ResNet-20", "MobileNetV3"], help="parts of the names of the networks")
    add("--images", type=int, default=100, help="images under each corruption")
    add("--samples", type=int, default=10, help="networks drawn")
    return parser.parse_args()


if __name__ == "__main__":
    main()
