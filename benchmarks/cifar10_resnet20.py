"""Makes a pretrained ResNet-20 Bayesian, fine-tunes it on CIFAR-10 and measures what its uncertainty is worth."""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import datasets
import networks
import torch
from datasets import Images
from evaluation import Metrics, cross_fitted_temperature, evaluate
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2

import bnnify

MOPED_DELTA = 0.2
LEARNING_RATE = 0.05
AVERAGING = 0.98
"""Decay of the exponential moving average of the weights, which is what gets evaluated."""
BATCH_SIZE = 128
AUGMENTATION = v2.Compose(
    [
        v2.RandomCrop(32, padding=4),
        v2.RandomHorizontalFlip(),
        # Blur and noise leave the network something to be uncertain about in images that it has fitted to 99.8 %.
        v2.RandomApply([v2.GaussianBlur(5, sigma=(0.1, 1.0))], p=0.1),
        v2.RandomApply([v2.GaussianNoise(sigma=0.03)], p=0.1),
    ]
)


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    train = datasets.cifar10(train=True, data=options.data)
    tests = {"test": datasets.cifar10(train=False, data=options.data)}
    if options.data:
        tests["JPEG"] = datasets.cifar10_jpeg(options.data)
    network = networks.resnet20(options.checkpoint or _default_checkpoint(options.data))

    started = time.perf_counter()
    results: list[Result] = []
    with Progress(transient=True) as progress:
        for result in compare(network.to(memory_format=torch.channels_last), train, tests, options, progress):
            results.append(result)
            report = _report(options, tests, results, minutes=(time.perf_counter() - started) / 60)
            if options.output:  # after every row, so that an interrupted run leaves what it has measured
                options.output.write_text(json.dumps(report, indent=2) + "\n")
    Console(width=120).print(_table(report, results))


@dataclass(frozen=True)
class Result:
    """What one network, trained from one seed, scores on one set of images."""

    images: str
    network: str
    seed: int
    metrics: Metrics


def compare(
    network: nn.Module, train: Images, tests: dict[str, Images], options: argparse.Namespace, progress: Progress
) -> Iterator[Result]:
    """Measures the network as it is, with a temperature, and with each library's posterior."""
    for name, test in tests.items():
        logits = torch.cat([_logits(network, inputs) for inputs in _inputs(test, progress, f"deterministic, {name}")])
        yield Result(name, "deterministic", 0, evaluate(logits.softmax(1), test.labels))
        # No network may see the labels it is judged by: each half of the test images gets the other's temperature.
        scaled = cross_fitted_temperature(logits, test.labels)
        yield Result(name, "temperature scaling", 0, evaluate(scaled, test.labels))

    def measure(contender: Contender, row: str, seed: int) -> Iterator[Result]:
        for name, test in tests.items():
            batches = _inputs(test, progress, f"{row}, {name}, seed {seed}")
            probabilities = torch.cat([contender.probabilities(inputs, options.predict_samples) for inputs in batches])
            yield Result(name, row, seed, evaluate(probabilities, test.labels))

    kinds: dict[type[Contender], int] = {
        Bnnify: options.seeds,
        Deterministic: options.peer_seeds,
        BayesianTorch: options.peer_seeds,
    }
    for kind, seeds in kinds.items():
        for seed in range(seeds):
            torch.manual_seed(seed)
            contender = kind(network, num_data=len(train.labels), rho_lr=options.rho_lr)
            if kind is Bnnify and seed == 0:
                yield from measure(contender, f"{kind.name}, converted", seed)
            fine_tune(contender, train, options, progress, f"fine-tuning with {kind.name}, seed {seed}")
            yield from measure(contender, f"{kind.name}, fine-tuned", seed)


def fine_tune(
    contender: Contender, train: Images, options: argparse.Namespace, progress: Progress, description: str
) -> None:
    """Minimises the negative ELBO by SGD with a cosine schedule; batch norm goes on following the batches.

    Forward and backward run in bfloat16 where autocast thinks it safe, at half the time; evaluation is in float32.
    """
    steps = options.steps or round(options.epochs * len(train.labels) / BATCH_SIZE)
    optimizer = torch.optim.SGD(contender.parameter_groups(), momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    average = AveragedModel(contender.model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGING), use_buffers=True)
    contender.model.train()
    for batch in progress.track(_batches(train, steps), total=steps, description=description):
        inputs = _normalize(torch.stack([AUGMENTATION(image) for image in batch.pixels]))
        optimizer.zero_grad()
        for _ in range(options.samples):
            with torch.autocast("cpu", torch.bfloat16):
                loss = contender.loss(inputs, batch.labels)
            (loss / options.samples).backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(contender.model)
    contender.model = average.module


class Contender(ABC):
    """A Bayesian copy of a network: how it is trained, and how it predicts."""

    name: str
    model: nn.Module

    @abstractmethod
    def __init__(self, network: nn.Module, num_data: int, rho_lr: float) -> None: ...

    @abstractmethod
    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """The negative ELBO per image, from one draw of the weights."""

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is trained, and how fast."""

    @abstractmethod
    def probabilities(self, inputs: Tensor, samples: int) -> Tensor:
        """The predictive distribution: the average over draws of the weights."""


class Bnnify(Contender):
    name = "bnnify"

    def __init__(self, network: nn.Module, num_data: int, rho_lr: float) -> None:
        self.model = bnnify.convert(network)
        self.num_data, self.rho_lr = num_data, rho_lr

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        logits, kl = self.model(inputs)
        return bnnify.elbo(F.cross_entropy(logits, labels), kl, num_data=self.num_data)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return self.model.parameter_groups(lr=LEARNING_RATE, rho_lr=self.rho_lr)

    def probabilities(self, inputs: Tensor, samples: int) -> Tensor:
        return self.model.predict(inputs, num_samples=samples, likelihood="logits").mean


class Deterministic(Contender):
    """No posterior, but the same fine-tuning: what the augmentation does by itself."""

    name = "deterministic"

    def __init__(self, network: nn.Module, num_data: int, rho_lr: float) -> None:
        self.model = copy.deepcopy(network)

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.model(inputs), labels)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.model.parameters()), "lr": LEARNING_RATE}]

    def probabilities(self, inputs: Tensor, samples: int) -> Tensor:
        return _logits(self.model, inputs).softmax(1)


class BayesianTorch(Contender):
    """bayesian-torch with MOPED, its fairest setting: σ = δ|w|, as large relative to the weights as bnnify's."""

    name = "bayesian-torch"

    def __init__(self, network: nn.Module, num_data: int, rho_lr: float) -> None:
        from bayesian_torch.models.dnn_to_bnn import dnn_to_bnn, get_kl_loss

        settings = {"prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0, "posterior_rho_init": -3.0}
        settings |= {"type": "Reparameterization", "moped_enable": True, "moped_delta": MOPED_DELTA}
        self.model = copy.deepcopy(network)
        dnn_to_bnn(self.model, settings)
        self.model.to(memory_format=torch.channels_last)
        self.kl, self.rho_lr = get_kl_loss, rho_lr

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        # As its documentation has it, though its KL is a sum over tensors of means over their weights, not a sum.
        return F.cross_entropy(self.model(inputs), labels) + self.kl(self.model) / BATCH_SIZE

    def parameter_groups(self) -> list[dict[str, Any]]:
        named = dict(self.model.named_parameters())
        rhos = [parameter for name, parameter in named.items() if ".rho_" in name]
        others = [parameter for name, parameter in named.items() if ".rho_" not in name]
        return [{"params": others, "lr": LEARNING_RATE}, {"params": rhos, "lr": self.rho_lr}]

    def probabilities(self, inputs: Tensor, samples: int) -> Tensor:
        return torch.stack([_logits(self.model, inputs).softmax(1) for _ in range(samples)]).mean(0)


def _batches(train: Images, steps: int) -> Iterator[Images]:
    """Batches without replacement, from as many epochs as it takes."""
    per_epoch = len(train.labels) // BATCH_SIZE
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(train.labels)).split(BATCH_SIZE)
        yield train.take(order[step % per_epoch])


def _inputs(test: Images, progress: Progress, description: str) -> Iterator[Tensor]:
    for pixels in progress.track(test.pixels.split(500), description=description):
        yield _normalize(pixels)


def _normalize(pixels: Tensor) -> Tensor:
    inputs = datasets.normalize(pixels, networks.CHECKPOINT_MEAN, networks.CHECKPOINT_STD)
    return inputs.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def _logits(network: nn.Module, inputs: Tensor) -> Tensor:
    return network.eval()(inputs)


def _default_checkpoint(data: Path | None) -> Path:
    return data / "checkpoints" / networks.CHECKPOINT if data else networks.download_checkpoint()


def _report(
    options: argparse.Namespace, tests: dict[str, Images], results: list[Result], minutes: float
) -> dict[str, Any]:
    libraries = ("torch", "torchvision", "torchmetrics", "bayesian-torch")
    return {
        "versions": {"python": platform.python_version()} | {library: version(library) for library in libraries},
        "machine": {"cpu": _cpu(), "threads": options.threads},
        "minutes": round(minutes, 1),
        "images": {name: len(test.labels) for name, test in tests.items()},
        "options": {name: value for name, value in vars(options).items() if isinstance(value, int | float)},
        "recipe": {
            "learning rate": LEARNING_RATE,
            "decay of the average": AVERAGING,
            "batch size": BATCH_SIZE,
            "augmentation": " ".join(str(AUGMENTATION).split()),
        },
        "results": [asdict(result) for result in results],
    }


def _table(report: dict[str, Any], results: list[Result]) -> Table:
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    machine = f"{report['machine']['cpu']}, {report['machine']['threads']} threads, {report['minutes']} minutes"
    title = "ResNet-20 on CIFAR-10: mean ± standard deviation over seeds"
    effort = ", ".join(f"{name} {value}" for name, value in report["options"].items())
    table = Table(title=title, caption=f"{effort}\n{versions}\n{machine}")
    for column in "images", "network", "accuracy %", "NLL", "ECE [95 % interval]", "entropy":
        table.add_column(column)
    for images, count in report["images"].items():
        of_images = [result for result in results if result.images == images]
        for network in dict.fromkeys(result.network for result in of_images):
            runs = [result.metrics for result in of_images if result.network == network]
            table.add_row(f"{count:,} {images}", network, *_cells(runs))
        table.add_section()
    return table


def _cells(runs: list[Metrics]) -> Iterator[str]:
    low, high = (fmean(ends) for ends in zip(*(run.ece_interval for run in runs), strict=True))
    yield _spread([100 * run.accuracy for run in runs], digits=2)
    yield _spread([run.nll for run in runs])
    yield f"{_spread([run.ece for run in runs])} [{low:.3f}, {high:.3f}]"
    yield _spread([run.entropy for run in runs])


def _spread(values: list[float], digits: int = 3) -> str:
    return f"{fmean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, help="folder of archives with CIFAR-10 and its JPEGs; else torchvision downloads CIFAR-10")
    add("--checkpoint", type=Path, help="the pretrained weights; else those in --data, else downloaded")
    add("--epochs", type=float, default=2, help="length of the fine-tuning")
    add("--steps", type=int, help="length of the fine-tuning in batches, instead of --epochs")
    add("--seeds", type=int, default=1, help="how often to fine-tune with bnnify")
    add("--peer-seeds", type=int, default=1, help="how often to fine-tune without a posterior and with bayesian-torch")
    add("--samples", type=int, default=1, help="draws of the weights per training step")
    add("--rho-lr", type=float, default=0.0, help="learning rate of ρ; 0 keeps σ as converted")
    add("--predict-samples", type=int, default=32, help="draws of the weights per prediction")
    add("--threads", type=int, default=torch.get_num_threads(), help="threads of the CPU")
    add("--output", type=Path, help="where to write the results as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
