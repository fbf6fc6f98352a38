"""Makes a pretrained ResNet-20 Bayesian, fine-tunes it on CIFAR-10 and measures what its uncertainty is worth."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bnnify

from ..harness import peers, report
from ..harness.data import Images, cifar10, cifar10_jpeg
from ..harness.evaluation import Result, cross_fitted_temperature, evaluate, grouped, logits, score_cells
from ..harness.fine_tuning import AUGMENTATION, BATCH_SIZE, fine_tune
from ..harness.networks.cifar_resnet import inputs, pretrained
from ..harness.progress import track
from ..harness.report import Run, Table, spread

LIBRARIES = ("torch", "torchvision", "torchmetrics", "bayesian-torch")
LEARNING_RATE = 0.05
AVERAGING = 0.98
"""Decay of the exponential moving average of the weights, which is what gets evaluated."""
TRIAL_IMAGES = 64


def main() -> None:
    options = _options()
    run = Run(options, LIBRARIES)
    train = cifar10(train=True, data=options.data)
    tests = {"test": cifar10(train=False, data=options.data)}
    if options.data:
        tests["JPEG"] = cifar10_jpeg(options.data)
    if images := options.images or (TRIAL_IMAGES if options.steps else None):
        tests = {name: test.evenly(images) for name, test in tests.items()}
    tests = {f"{len(test.labels):,} {name}": test for name, test in tests.items()}
    recipe = {
        "learning rate": LEARNING_RATE,
        "decay of the average": AVERAGING,
        "batch size": BATCH_SIZE,
        "augmentation": " ".join(str(AUGMENTATION).split()),
    }
    network = pretrained(options.data, options.checkpoint)
    results = run.collect(compare(network, train, tests, options), recipe=recipe)
    rows = [
        [*key, *score_cells(runs), spread([run.metrics.entropy for run in runs])]
        for key, runs in grouped(results).items()
    ]
    title = "ResNet-20 on CIFAR-10: mean ± standard deviation over seeds"
    headings = ["images", "network", "accuracy %", "NLL", "ECE [95 % interval]", "entropy"]
    run.show(Table(title, headings, rows, names=2))


def compare(
    network: nn.Module, train: Images, tests: dict[str, Images], options: argparse.Namespace
) -> Iterator[Result]:
    """Measures the network as it is, with a temperature, and with each library's posterior."""
    for images, test in tests.items():
        found = logits(network, inputs(test.pixels))
        yield Result(images, "deterministic", evaluate(found.softmax(1), test.labels))
        # No network may see the labels it is judged by: each half of the test images gets the other's temperature.
        scaled = cross_fitted_temperature(found, test.labels)
        yield Result(images, "temperature scaling", evaluate(scaled, test.labels))

    def measure(model: nn.Module, row: str, seed: int) -> Iterator[Result]:
        samples = 1 if row.startswith("deterministic") else options.predict_samples
        for images, test in tests.items():
            batches = track(inputs(test.pixels).split(500), f"{row}, {images}, seed {seed}")
            probabilities = torch.cat([_probabilities(model, batch, samples) for batch in batches])
            yield Result(images, row, evaluate(probabilities, test.labels), seed)

    kinds = {"bnnify": options.seeds, "deterministic": options.peer_seeds, "bayesian-torch": options.peer_seeds}
    for kind, seeds in kinds.items():
        for seed in range(seeds):
            torch.manual_seed(seed)
            settings = {"posterior_std": _start(train, options.fraction)} if kind == "bnnify" else {}
            made = peers.variant(kind, network, channels_last=True, **settings)
            if kind == "bnnify" and seed == 0:
                yield from measure(made.model, f"{kind}, converted", seed)
            # The documentation of bayesian-torch divides its KL, a sum over tensors of means over their weights, so.
            num_data = BATCH_SIZE if kind == "bayesian-torch" else len(train.labels)
            model = fine_tune(
                made,
                num_data,
                train,
                steps=options.steps or round(options.epochs * len(train.labels) / BATCH_SIZE),
                lr=LEARNING_RATE,
                decay=AVERAGING,
                rho_lr=options.rho_lr,
                draws=options.samples,
                description=f"fine-tuning with {kind}, seed {seed}",
            )
            yield from measure(model, f"{kind}, fine-tuned", seed)


def _start(train: Images, fraction: float | None) -> Any:
    """The rule for bnnify's σ."""
    if fraction is None:
        return bnnify.Relative(0.2, full_width=32)
    return bnnify.ResponseStd(list(inputs(train.pixels[:500]).split(100)), fraction)


@torch.no_grad()
def _probabilities(model: nn.Module, batch: Tensor, samples: int) -> Tensor:
    model.eval()
    if isinstance(model, bnnify.BayesianModel):
        return model.predict(batch, num_samples=samples, likelihood="logits").mean
    return peers.average(model, batch, samples)


def _options() -> argparse.Namespace:
    parser = report.parser(__doc__)
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        help="folder as in benchmarks/README.md; else CIFAR-10 is downloaded, without JPEGs",
    )
    add("--checkpoint", type=Path, help="the pretrained weights; else those in --data, else downloaded")
    add("--epochs", type=float, default=2, help="length of the fine-tuning")
    add("--steps", type=int, help=f"batches of a trial, in place of --epochs, with {TRIAL_IMAGES} images to a set")
    add("--images", type=int, help="how many test images of each set, evenly spread; else all, or those of a trial")
    add("--seeds", type=int, default=1, help="how often to fine-tune with bnnify")
    add("--peer-seeds", type=int, default=1, help="how often to fine-tune without a posterior and with bayesian-torch")
    add("--samples", type=int, default=1, help="draws of the weights per training step")
    add("--fraction", type=float, help="of ResponseStd, from 500 training images, instead of a fifth of the rms for σ")
    add("--rho-lr", type=float, default=0.0, help="learning rate of ρ; 0 keeps σ as converted")
    add("--predict-samples", type=int, default=32, help="draws of the weights per prediction")
    return parser.parse_args()


if __name__ == "__main__":
    main()
