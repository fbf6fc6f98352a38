"""Makes a pretrained ResNet-20 Bayesian with several starting σ and measures each as converted, without training."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

import bnnify

from ..harness import report
from ..harness.data import Images, cifar10, cifar10_jpeg
from ..harness.evaluation import Result, cross_fitted_temperature, evaluate, grouped, logits, score_cells
from ..harness.fit import fit
from ..harness.networks.cifar_resnet import inputs, pretrained
from ..harness.progress import track
from ..harness.report import Run, Table

BATCH_SIZE = 128
IMAGES_PER_DRAW = 100
"""Few, so that many networks are drawn in all, and the figures depend less on which."""
DROPOUT_RATES = [0.05 * step for step in range(1, 19)]
DROPOUT_SAMPLES = 32
RMS = "0.2 rms, full width 32"


def main() -> None:
    options = _options()
    run = Run(options, ("torch", "torchvision", "torchmetrics"))
    torch.manual_seed(0)
    train = cifar10(train=True, data=options.data)
    tests = {"test": cifar10(train=False, data=options.data)}
    if options.data:  # sorted by class, so every tenth has a hundred of each
        tests["JPEG"] = cifar10_jpeg(options.data).take(slice(None, None, 10))
    tests = {f"{len(test.labels):,} {name}": test for name, test in tests.items()}
    network = pretrained(options.data, options.checkpoint)
    results = run.collect(compare(network, train, tests, options))
    rows = [
        [*key, *score_cells(runs), "".join(f"{fitted:.2f}" for fitted in runs[0].others.values())]
        for key, runs in grouped(results).items()
    ]
    title = "ResNet-20 on CIFAR-10, as converted; whatever is fitted is cross-fitted"
    headings = ["images", "network", "accuracy %", "NLL", "ECE [95 % interval]", "fitted"]
    run.show(Table(title, headings, rows, names=2))


def compare(
    network: nn.Module, train: Images, tests: dict[str, Images], options: argparse.Namespace
) -> Iterator[Result]:
    """Measures the network as it is, with a temperature and with dropout, and under each starting σ.

    A factor on σ or a rate of dropout is fitted on each half of the images, for the other; the result has the mean.
    """

    def result(images: str, row: str, probabilities: Tensor, fitted: list[float] | None = None) -> Result:
        others = {"fitted": fmean(fitted)} if fitted else {}
        return Result(images, row, evaluate(probabilities, tests[images].labels), others=others)

    for images, test in tests.items():
        found = _logits(network, test)
        yield result(images, "deterministic", found.softmax(1))
        yield result(images, "temperature scaling", cross_fitted_temperature(found, test.labels))
        yield result(images, "MC dropout before the last layer", *_cross_fitted_dropout(network, test))

    for row, setting in settings(network, train, options).items():
        for images, test in tests.items():
            bnn = bnnify.convert(network, **setting)
            yield result(images, row, _predict(bnn, test, options, f"{row}, {images}"))
            for per_layer in [False, True] if options.per_layer and row == RMS else [False]:
                what = f"{row}, tuned per layer" if per_layer else f"{row}, tuned"
                yield result(images, what, *_cross_tuned(bnn, test, per_layer, options, f"{what}, {images}"))


def settings(network: nn.Module, train: Images, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What `convert` is told about σ, by what it is called in the table."""
    chosen = train.take(torch.randperm(len(train.labels))[: options.fisher_images])
    num_data = len(train.labels)
    fisher = bnnify.FisherStd.estimate(network, _loader(chosen, BATCH_SIZE), num_data=num_data, likelihood="logits")
    adam = bnnify.FisherStd.from_adam(
        network, adam_state(network, train, options.adam_steps), num_data=num_data, batch_size=BATCH_SIZE
    )
    wide = bnnify.FisherStd(fisher.fisher, num_data, prior_std=bnnify.Relative(1.0))
    return {
        RMS: {"posterior_std": bnnify.Relative(0.2, full_width=32)},
        "FisherStd.estimate": {"posterior_std": fisher},
        "FisherStd.from_adam": {"posterior_std": adam},
        "Moped(0.2)": {"posterior_std": bnnify.Moped(0.2)},
        "FisherStd.estimate, s = rms": {"posterior_std": wide},
    }


def adam_state(network: nn.Module, train: Images, steps: int) -> dict[str, Any]:
    """What Adam's state would be in a checkpoint of the training: that of steps with a learning rate of zero."""
    network = copy.deepcopy(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.0)
    augment = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])
    order = torch.randperm(len(train.labels))
    indices = order[: steps * BATCH_SIZE].split(BATCH_SIZE)

    def prepare(pixels: Tensor) -> Tensor:
        return inputs(torch.stack([augment(image) for image in pixels]))

    fit(network, optimizer, train, indices, prepare=prepare, description="filling Adam's state")
    return optimizer.state_dict()


def _cross_tuned(
    bnn: bnnify.BayesianModel, test: Images, per_layer: bool, options: argparse.Namespace, description: str
) -> tuple[Tensor, list[float]]:
    """Probabilities of each half of the images with σ tuned on the other half."""
    probabilities = torch.empty(len(test.labels), 10)
    factors: list[float] = []
    for start in (0, 1):
        tuned = copy.deepcopy(bnn)
        rest = test.take(slice(1 - start, None, 2))
        with _bfloat16():
            found = bnnify.tune_std(
                tuned, _loader(rest), num_samples=options.tune_samples, per_layer=per_layer, likelihood="logits"
            )
        factors += [] if per_layer else [found.factor]
        probabilities[start::2] = _predict(tuned, test.take(slice(start, None, 2)), options, description)
    return probabilities, factors


def _cross_fitted_dropout(network: nn.Module, test: Images) -> tuple[Tensor, list[float]]:
    """Dropout where the network has none: on the inputs of its last layer, at the best rate for the other half."""
    seen: list[Tensor] = []
    hook = network.linear.register_forward_pre_hook(lambda layer, args: seen.append(args[0].float()))
    _logits(network, test)
    hook.remove()
    features = torch.cat(seen)

    @torch.no_grad()
    def probabilities(features: Tensor, rate: float) -> Tensor:
        torch.manual_seed(0)
        drawn = [network.linear(F.dropout(features, rate)).softmax(1) for _ in range(DROPOUT_SAMPLES)]
        return torch.stack(drawn).mean(0)

    found, rates = torch.empty(len(test.labels), 10), []
    for start in (0, 1):
        rest, labels = features[1 - start :: 2], test.labels[1 - start :: 2]
        nlls = {rate: F.nll_loss(probabilities(rest, rate).log(), labels).item() for rate in DROPOUT_RATES}
        rates.append(min(nlls, key=nlls.__getitem__))
        found[start::2] = probabilities(features[start::2], rates[-1])
    return found, rates


def _predict(bnn: bnnify.BayesianModel, images: Images, options: argparse.Namespace, description: str) -> Tensor:
    torch.manual_seed(0)  # for each row the same, so that two rows do not differ by luck alone
    with _bfloat16():
        batches = track(_loader(images), description)
        return torch.cat([bnn.predict(x, options.predict_samples, likelihood="logits").mean for x, _ in batches])


def _logits(network: nn.Module, images: Images) -> Tensor:
    with _bfloat16():
        return logits(network, inputs(images.pixels), IMAGES_PER_DRAW).float()


def _loader(images: Images, batch_size: int = IMAGES_PER_DRAW) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(inputs(images.pixels), images.labels), batch_size)


def _bfloat16() -> torch.autocast:
    """At half the time or less; the deterministic network is measured in it too."""
    return torch.autocast("cpu", torch.bfloat16)


def _options() -> argparse.Namespace:
    parser = report.parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, help="folder of archives with CIFAR-10 and its JPEGs; else torchvision downloads CIFAR-10")
    add("--checkpoint", type=Path, help="the pretrained weights; else those in --data, else downloaded")
    add("--fisher-images", type=int, default=2000, help="training images from which FisherStd is estimated")
    add("--adam-steps", type=int, default=30, help="batches that Adam sees, with a learning rate of zero")
    add("--tune-samples", type=int, default=4, help="draws of the weights per candidate when σ is tuned")
    add("--predict-samples", type=int, default=16, help="draws of the weights per prediction")
    add("--per-layer", action="store_true", help="tune the default per layer too, which takes long")
    return parser.parse_args()


if __name__ == "__main__":
    main()
