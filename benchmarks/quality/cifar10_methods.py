"""A pretrained ResNet-20 beside every method that people would use to have its uncertainty, on CIFAR-10 and off it.

Fine-tuning has the same steps and augmentation for all. Every second of the first 1,000 test images is for choosing:
a temperature, and one setting of each method out of a few. Judged are the others, their corruptions, and JPEGs of other
test images: the published checkpoint has seen all training images, which tell nothing about its confidence any more.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..harness import methods, report, scores
from ..harness.data import Images, cifar10, fashion_mnist, mnist
from ..harness.fine_tuning import HAS_BFLOAT16, bfloat16
from ..harness.methods import Networks
from ..harness.networks.cifar_resnet import inputs, pretrained
from ..harness.report import Rows, Run
from ..harness.shifted_images import as_cifar, corrupted, noise, other_jpegs, photographs
from .cifar10_methods_report import tables
from .cifar10_rows import FULL_STEPS, Made, Methods

LIBRARIES = (
    *("torch", "torchvision", "torchmetrics", "laplace-torch", "ivon-opt", "bayesian-torch", "imagecorruptions"),
    *("numpy", "scikit-image", "scikit-learn"),
)
KEPT = Path(__file__).parents[1] / "results" / "cifar10_methods.json"
SEVERITIES = (1, 3, 5)
FULL = {"steps": FULL_STEPS, "lr": 0.05, "images": 500, "jpegs": 9000, "odd": 2000, "seeds": 3, "linearised": True}


def main() -> None:
    options = _options()
    if options.kept:
        report.show_kept(options, tables)
        return
    run = Run(options, LIBRARIES)
    already = _rows(options.output) if options.output and options.output.exists() else []
    network = pretrained(options.data, options.checkpoint)
    facts = {"blocks": len(network.layer1), "bfloat16": HAS_BFLOAT16}
    run.show(*tables(run.collect(compare(network, already, options), already, **facts)))


def compare(network: nn.Module, already: Rows, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measures the methods, seed by seed, but for those that lie in the output already."""
    clean = cifar10(False, options.data).take(slice(1000))
    validation, test = clean.take(slice(0, None, 2)), clean.take(slice(1, None, 2))
    known, odd = image_sets(options, clean, test)
    others = _rows(options.settings) if options.settings else []
    chosen = {row["row"]: row["setting"] for row in [*others, *already]}
    makers = Methods(network, cifar10(True, options.data), validation, options, chosen)
    sets = {"validation": validation, **known, **odd}

    @functools.lru_cache(maxsize=1)  # the row with a temperature comes after the one with the same networks
    def predict(networks: Networks, description: str) -> tuple[dict[str, Tensor], float]:
        return predictions(networks, sets, description)

    for seed in range(options.seeds):
        for name, make in makers.rows(seed).items():
            if (name, seed) in {(row["row"], row["seed"]) for row in already}:
                continue
            if options.rows and name not in options.rows:
                continue
            # No figure depends on what else is measured in this run.
            torch.manual_seed(seed)
            made = make()
            torch.manual_seed(seed)
            logits, cost = predict(made.networks, f"seed {seed}")
            found = measure(made, logits, validation, known, odd)
            yield {"row": name, "seed": seed, "prediction ms": cost} | found


def _rows(path: Path) -> Rows:
    return json.loads(path.read_text())["results"]


def image_sets(options: argparse.Namespace, clean: Images, test: Images) -> tuple[dict[str, Images], dict[str, Images]]:
    """Images of the ten classes, and others."""
    known = {"test": test, "JPEG": other_jpegs(options.data, clean.labels, options.jpegs)}
    for severity in SEVERITIES:
        parts = [part for _, part in corrupted(test, severity, options.images)]
        known[f"severity {severity}"] = Images(*map(torch.cat, zip(*parts, strict=True)))
    odd = {
        "Fashion-MNIST": as_cifar(fashion_mnist(False, options.data), options.odd),
        "MNIST": as_cifar(mnist(False, options.data), options.odd),
        "noise": noise(options.odd),
        "photographs": photographs(options.odd),
    }
    return known, odd


def predictions(networks: Networks, sets: dict[str, Images], description: str) -> tuple[dict[str, Tensor], float]:
    """The logits of all images, and how many milliseconds one takes."""
    started = time.process_time()
    with bfloat16():
        logits = {
            name: methods.predicted(networks, inputs(images.pixels), f"{description}, {name}")
            for name, images in sets.items()
        }
    seconds = time.process_time() - started
    return logits, 1000 * seconds / sum(len(images.labels) for images in sets.values())


def measure(
    made: Made, predicted: dict[str, Tensor], validation: Images, known: dict[str, Images], odd: dict[str, Images]
) -> dict[str, Any]:
    """All figures of a method, from the logits of each image and of those for validation."""
    logits = {name: each / made.temperature for name, each in predicted.items()}
    temperature = scores.temperature(logits["validation"], validation.labels)
    return {
        "setting": made.setting,
        "divided by": made.temperature,
        "training s": made.training,
        "networks": len(logits["test"]),
        "temperature": temperature,
        "known": {name: scores.scores(logits[name], images.labels, temperature) for name, images in known.items()},
        "odd": {name: scores.separations(logits["test"], logits[name]) for name in odd},
    }


def _options() -> argparse.Namespace:
    parser = report.parser(__doc__, kept=True)
    add = parser.add_argument
    add("--data", type=Path, help="folder as in benchmarks/README.md")
    add("--checkpoint", type=Path, help="the pretrained weights; else those in --data")
    add("--settings", type=Path, default=KEPT, help="take the settings that were chosen in this file of another run")
    add("--choose", dest="settings", action="store_const", const=None, help="choose settings anew, in twice the time")
    add("--full", action="store_true", help=f"hours: {', '.join(f'{name} {value}' for name, value in FULL.items())}")
    add("--rows", nargs="+", help="only these rows")
    add("--steps", type=int, default=60, help="batches of the fine-tuning")
    add("--lr", type=float, default=0.01, help="learning rate of SGD; ten times as much for IVON")
    add("--seeds", type=int, default=1, help="how often all that is random is done")
    add("--samples", type=int, default=10, help="networks per prediction")
    add("--members", type=int, default=5, help="networks of the ensemble")
    add("--images", type=int, default=20, help="images under each corruption and severity")
    add("--jpegs", type=int, default=250, help="JPEGs")
    add("--odd", type=int, default=100, help="images of each foreign set")
    add("--laplace-images", type=int, default=300, help="training images for Laplace; ten times as many for one layer")
    add("--linearised", action="store_true", help="add the linearised diagonal Laplace: 140 ms of one core an image")
    options = parser.parse_args()
    if not options.data and not options.kept:
        parser.error("--data is needed, unless tables are printed --from a file")
    if options.full:
        parser.set_defaults(**FULL)
        options = parser.parse_args()
    return options


if __name__ == "__main__":
    main()
