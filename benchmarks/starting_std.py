"""Makes a pretrained ResNet-20 Bayesian with several starting σ and measures each as converted, without training."""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import datasets
import networks
import torch
from datasets import Images
from evaluation import Metrics, cross_fitted_temperature, evaluate
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

import bnnify
from bnnify.distributions.initial_std import DEFAULT_POSTERIOR_STD

BATCH_SIZE = 128
IMAGES_PER_DRAW = 100
"""Few, so that many networks are drawn in all, and the figures depend less on which."""
DROPOUT_RATES = [0.05 * step for step in range(1, 19)]
DROPOUT_SAMPLES = 32


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    train = datasets.cifar10(train=True, data=options.data)
    tests = {"test": datasets.cifar10(train=False, data=options.data)}
    if options.data:  # sorted by class, so every tenth has a hundred of each
        tests["JPEG"] = datasets.cifar10_jpeg(options.data).take(slice(None, None, 10))
    network = networks.resnet20(options.checkpoint or _default_checkpoint(options.data))
    network = network.to(memory_format=torch.channels_last)

    started = time.perf_counter()
    results: list[Result] = []
    for result in compare(network, train, tests, options):
        results.append(result)
        minutes = (time.perf_counter() - started) / 60
        report = _report(options, tests, results, minutes)
        if options.output:  # after every row, so that an interrupted run leaves what it has measured
            options.output.write_text(json.dumps(report, indent=2) + "\n")
        print(f"{minutes:5.1f} min: {result.network}, {result.images}: NLL {result.metrics.nll:.3f}", flush=True)
    Console(width=120).print(_table(report, results))


@dataclass(frozen=True)
class Result:
    """What one network scores on one set of images, and what was fitted on its halves."""

    images: str
    network: str
    metrics: Metrics
    fitted: tuple[float, ...] = ()
    """What was fitted on each half of the images: a factor on σ, or a rate of dropout."""


def compare(
    network: nn.Module, train: Images, tests: dict[str, Images], options: argparse.Namespace
) -> Iterator[Result]:
    """Measures the network as it is, with a temperature and with dropout, and under each starting σ."""
    for name, test in tests.items():
        logits = _logits(network, test)
        yield Result(name, "deterministic", evaluate(logits.softmax(1), test.labels))
        yield Result(name, "temperature scaling", evaluate(cross_fitted_temperature(logits, test.labels), test.labels))
        dropped, rates = _cross_fitted_dropout(network, test)
        yield Result(name, "MC dropout before the last layer", evaluate(dropped, test.labels), rates)

    for row, std in starting_stds(network, train, options).items():
        for name, test in tests.items():
            bnn = bnnify.convert(network, posterior_std=std)
            yield Result(name, row, evaluate(_predict(bnn, test, options), test.labels))
            for per_layer in [False, True] if options.per_layer and row == "default" else [False]:
                tuned, factors = _cross_tuned(bnn, test, per_layer, options)
                what = f"{row}, tuned per layer" if per_layer else f"{row}, tuned"
                yield Result(name, what, evaluate(tuned, test.labels), factors)


def starting_stds(network: nn.Module, train: Images, options: argparse.Namespace) -> dict[str, Any]:
    """The rules for σ, by what they are called in the table."""
    chosen = train.take(torch.randperm(len(train.labels))[: options.fisher_images])
    loader = DataLoader(TensorDataset(_normalize(chosen.pixels), chosen.labels), BATCH_SIZE)
    num_data = len(train.labels)
    fisher = bnnify.FisherStd.estimate(network, loader, num_data=num_data)
    adam = bnnify.FisherStd.from_adam(
        network, adam_state(network, train, options.adam_steps), num_data=num_data, batch_size=BATCH_SIZE
    )
    wide = bnnify.FisherStd(fisher.fisher, num_data, prior_std=bnnify.Relative(1.0))
    return {
        "default": DEFAULT_POSTERIOR_STD,
        "FisherStd.estimate": fisher,
        "FisherStd.from_adam": adam,
        "Moped(0.2)": bnnify.Moped(0.2),
        "FisherStd.estimate, s = rms": wide,
    }


def adam_state(network: nn.Module, train: Images, steps: int) -> dict[str, Any]:
    """What Adam's state would be in a checkpoint of the training: that of steps with a learning rate of zero."""
    network = copy.deepcopy(network).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.0)
    augment = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])
    order = torch.randperm(len(train.labels))
    for batch in order[: steps * BATCH_SIZE].split(BATCH_SIZE):
        inputs = _normalize(torch.stack([augment(image) for image in train.pixels[batch]]))
        optimizer.zero_grad()
        F.cross_entropy(network(inputs), train.labels[batch]).backward()
        optimizer.step()
    return optimizer.state_dict()


def _cross_tuned(
    bnn: bnnify.BayesianModel, test: Images, per_layer: bool, options: argparse.Namespace
) -> tuple[Tensor, tuple[float, ...]]:
    """Probabilities of each half of the images with σ tuned on the other half."""
    probabilities = torch.empty(len(test.labels), 10)
    factors: list[float] = []
    for start in (0, 1):
        tuned = copy.deepcopy(bnn)
        rest = test.take(slice(1 - start, None, 2))
        with _bfloat16():
            found = bnnify.tune_std(tuned, _loader(rest), num_samples=options.tune_samples, per_layer=per_layer)
        factors += [] if isinstance(found, dict) else [found]
        probabilities[start::2] = _predict(tuned, test.take(slice(start, None, 2)), options)
    return probabilities, tuple(factors)


def _cross_fitted_dropout(network: nn.Module, test: Images) -> tuple[Tensor, tuple[float, ...]]:
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
    return found, tuple(rates)


def _predict(bnn: bnnify.BayesianModel, images: Images, options: argparse.Namespace) -> Tensor:
    torch.manual_seed(0)  # for each row the same, so that two rows do not differ by luck alone
    with _bfloat16():
        batches = [bnn.predict(x, options.predict_samples, likelihood="logits").mean for x, _ in _loader(images)]
    return torch.cat(batches)


@torch.no_grad()
def _logits(network: nn.Module, images: Images) -> Tensor:
    with _bfloat16():
        return torch.cat([network(inputs) for inputs, _ in _loader(images)]).float()


def _loader(images: Images) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(_normalize(images.pixels), images.labels), IMAGES_PER_DRAW)


def _normalize(pixels: Tensor) -> Tensor:
    inputs = datasets.normalize(pixels, networks.CHECKPOINT_MEAN, networks.CHECKPOINT_STD)
    return inputs.contiguous(memory_format=torch.channels_last)


def _bfloat16() -> torch.autocast:
    """At half the time or less; the deterministic network is measured in it too."""
    return torch.autocast("cpu", torch.bfloat16)


def _default_checkpoint(data: Path | None) -> Path:
    return data / "checkpoints" / networks.CHECKPOINT if data else networks.download_checkpoint()


def _report(
    options: argparse.Namespace, tests: dict[str, Images], results: list[Result], minutes: float
) -> dict[str, Any]:
    libraries = ("torch", "torchvision", "torchmetrics")
    return {
        "versions": {"python": platform.python_version()} | {library: version(library) for library in libraries},
        "machine": f"{platform.machine()}, {options.threads} threads",
        "minutes": round(minutes, 1),
        "images": {name: len(test.labels) for name, test in tests.items()},
        "options": {name: value for name, value in vars(options).items() if isinstance(value, int)},
        "results": [asdict(result) for result in results],
    }


def _table(report: dict[str, Any], results: list[Result]) -> Table:
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    effort = ", ".join(f"{name} {value}" for name, value in report["options"].items())
    caption = f"{effort}\n{versions}\n{report['machine']}, {report['minutes']} minutes"
    table = Table(title="ResNet-20 on CIFAR-10, as converted; whatever is fitted is cross-fitted", caption=caption)
    for column in "images", "network", "accuracy %", "NLL", "ECE [95 % interval]", "fitted":
        table.add_column(column)
    for images, count in report["images"].items():
        for result in results:
            if result.images == images:
                run = result.metrics
                table.add_row(
                    f"{count:,} {images}",
                    result.network,
                    f"{100 * run.accuracy:.1f}",
                    f"{run.nll:.3f}",
                    f"{run.ece:.3f} [{run.ece_interval[0]:.3f}, {run.ece_interval[1]:.3f}]",
                    f"{fmean(result.fitted):.2f}" if result.fitted else "",
                )
        table.add_section()
    return table


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help="folder of archives with CIFAR-10 and its JPEGs; else torchvision downloads CIFAR-10")
    add("--checkpoint", type=Path, help="the pretrained weights; else those in --data, else downloaded")
    add("--fisher-images", type=int, default=2000, help="training images from which FisherStd is estimated")
    add("--adam-steps", type=int, default=30, help="batches that Adam sees, with a learning rate of zero")
    add("--tune-samples", type=int, default=4, help="draws of the weights per candidate when σ is tuned")
    add("--predict-samples", type=int, default=16, help="draws of the weights per prediction")
    add("--per-layer", action="store_true", help="tune the default per layer too, which takes long")
    add("--threads", type=int, default=torch.get_num_threads(), help="threads of the CPU")
    add("--output", type=Path, help="where to write the results as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
