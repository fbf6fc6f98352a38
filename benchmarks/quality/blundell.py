"""Reproduces the MNIST experiments of Blundell et al. 2015, "Weight Uncertainty in Neural Networks"."""

from __future__ import annotations

import argparse
import copy
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnnify

from ..harness import report
from ..harness.data import Images, mnist
from ..harness.fit import shuffled
from ..harness.progress import track
from ..harness.recorded import Recorded
from ..harness.report import Run
from .blundell_report import FRACTIONS, MIXTURE, Pruned, Result, plot, pruning_table, table

TRAIN, VALIDATION = slice(0, 50_000), slice(50_000, 60_000)
BATCH_SIZE = 128


@dataclass(frozen=True)
class Method:
    """How a network is trained: by SGD with momentum, or with a prior by Adam; the learning rate falls by a cosine."""

    lr: float
    dropout: tuple[float, float] = (0.0, 0.0)
    """Of the inputs and of the hidden units."""
    prior: bnnify.Prior | None = None
    posterior_std: float = 0.0
    init_scale: float = 1.0
    """Factor on PyTorch's initial weights."""
    warmup: float = 0.0
    """Share of the training in which the weight of the KL rises from 0."""


METHODS = {
    "SGD": Method(lr=0.05),
    "dropout": Method(lr=0.05, dropout=(0.2, 0.5)),
    "BBB, Gaussian": Method(lr=1e-3, prior=bnnify.Gaussian(std=0.05), posterior_std=math.exp(-5), warmup=0.8),
    MIXTURE: Method(
        lr=1e-3,
        prior=bnnify.ScaleMixture(pi=0.25, std1=math.exp(-2), std2=math.exp(-6)),
        posterior_std=math.exp(-5),
        init_scale=1.5,
        warmup=0.8,
    ),
}


def main() -> None:
    options = _options()
    if options.kept:
        report.show_kept(options, lambda rows: [table([Result(**row) for row in rows])])
        return
    run = Run(options, ("torch", "bnnify"))
    # The compiler's own random numbers are slow on a CPU, and no checkpoint could restore them.
    torch._inductor.config.fallback_random = True
    digits = load(options.data, options.device)
    results: list[Result] = []
    pruned: list[Pruned] = []
    networks: dict[str, nn.Module] = {}  # those of the last width, for the figures
    for width in options.widths:
        for name in options.methods:
            training = train(name, width, digits, options)
            results.append(evaluate(training, name, width, digits["test"], options.samples))
            networks[name] = training.model
            if name == MIXTURE and width == options.widths[-1]:
                pruned = list(prune(training.model, digits["test"], options.samples))
            run.record(results, pruned=pruned)
    if options.figures:
        plot(networks, options.figures)
    run.show(table(results), *([pruning_table(options.widths[-1], pruned)] if pruned else []))


class Training:
    """One network in training, written to a file after each epoch and taken up from there."""

    def __init__(
        self, method: Method, width: int, epochs: int, train: Images, beta: float = 1.0, compiled: bool = False
    ) -> None:
        self.method, self.epochs, self.train, self.beta = method, epochs, train, beta
        self.steps = len(train.labels) // BATCH_SIZE
        device = train.pixels.device
        self.model = build(method, width).to(device)
        self.forward = torch.compile(self.model) if compiled else self.model
        parameters = self.model.parameters()
        on_gpu = device.type == "cuda"
        lr: Any = torch.tensor(method.lr, device=device) if on_gpu else method.lr
        if method.prior is None:
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(parameters, lr, momentum=0.9, fused=True)
        else:
            self.optimizer = torch.optim.Adam(parameters, lr, fused=True, capturable=on_gpu)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, epochs * self.steps)
        self.now = torch.zeros((), device=device)
        """The weight of the KL in this step."""
        self.total = torch.zeros(2, device=device)
        self.step: Callable[..., None] = Recorded(self._step) if on_gpu else self._step
        self.log: list[dict[str, float]] = []

    def run_epoch(self, validation: Images, name: str) -> None:
        size = len(self.train.labels)
        warmup_steps = round(self.method.warmup * self.epochs * self.steps)
        self.model.train()
        self.total.zero_()
        description = f"{name}, epoch {len(self.log) + 1} of {self.epochs}"
        for index in track(shuffled(size, BATCH_SIZE, self.steps), description, total=self.steps):
            self.now.fill_(bnnify.linear_warmup(self.schedule.last_epoch, warmup_steps, self.beta))
            self.step(self.train.pixels[index], self.train.labels[index])
            self.schedule.step()
        nll, kl = (self.total / self.steps).tolist()
        self.log.append({"nll": nll, "kl": kl, "validation_error": error(self.model, validation)})

    def _step(self, inputs: Tensor, labels: Tensor) -> None:
        """With nothing that changes from step to step but tensors: a GPU records it once."""
        size = len(self.train.labels)
        self.optimizer.zero_grad()
        output, kl = self.forward(inputs), self.total.new_zeros(())
        if self.method.prior is not None:
            output, kl = output
        nll = F.cross_entropy(output, labels)
        self.total.add_(torch.stack([nll.detach(), kl.detach() / size]))
        bnnify.elbo(nll, self.now * kl, num_data=size).backward()
        self.optimizer.step()

    def save(self, path: Path) -> None:
        """Writes beside the file and then renames, so that an interruption leaves the last epoch's file whole."""
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "schedule")}
        parts |= {"log": self.log, "rng": torch.get_rng_state()}
        if torch.cuda.is_available():
            parts["cuda_rng"] = torch.cuda.get_rng_state()
        torch.save(parts, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)

    def resume(self, path: Path) -> None:
        parts = torch.load(path, map_location="cpu", weights_only=True)
        for name in ("model", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(parts[name])
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):  # a recorded step reads it on the device; the file has it on the CPU
                group["lr"] = group["lr"].to(self.total.device)
        self.log = parts["log"]
        torch.set_rng_state(parts["rng"])
        if "cuda_rng" in parts and torch.cuda.is_available():
            torch.cuda.set_rng_state(parts["cuda_rng"])


def build(method: Method, width: int) -> nn.Module:
    """Two hidden layers of rectified linear units, Bayesian where the method has a prior."""
    inputs, hidden = (nn.Dropout(p) if p else nn.Identity() for p in method.dropout)
    layers = [nn.Linear(784, width), nn.Linear(width, width), nn.Linear(width, 10)]
    for layer in layers:
        layer.weight.data *= method.init_scale
    network = nn.Sequential(inputs, layers[0], nn.ReLU(), hidden, layers[1], nn.ReLU(), hidden, layers[2])
    if method.prior is None:
        return network
    return bnnify.convert(network, inplace=True, prior=method.prior, posterior_std=method.posterior_std)


def train(name: str, width: int, digits: dict[str, Images], options: argparse.Namespace) -> Training:
    torch.manual_seed(options.seed)
    training = Training(METHODS[name], width, options.epochs, digits["train"], options.beta, options.compile)
    # The learning rate depends on the length of the training: another length is another network.
    settings = width, options.epochs, options.beta, options.seed
    file = "-".join([*name.replace(",", "").split(), *map(str, settings)]) + ".pt"
    path = options.checkpoints / file if options.checkpoints else None
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            training.resume(path)
    while len(training.log) < options.epochs:
        training.run_epoch(digits["validation"], f"{name}, {width} units")
        if path:
            training.save(path)
    return training


def evaluate(training: Training, name: str, width: int, test: Images, samples: int) -> Result:
    last = training.log[-1]
    ensemble = error(training.model, test, samples) if training.method.prior is not None else None
    return Result(
        name, width, len(training.log), test_error=error(training.model, test), ensemble_error=ensemble, **last
    )


def prune(bnn: bnnify.BayesianModel, test: Images, samples: int) -> Iterator[Pruned]:
    for fraction in FRACTIONS:
        network = copy.deepcopy(bnn)
        found = bnnify.prune(network, fraction)
        yield Pruned(fraction, found.numel - found.pruned, error(network, test), error(network, test, samples))


@torch.no_grad()
def error(model: nn.Module, digits: Images, samples: int = 0) -> float:
    """In percent: of the average over draws of the weights or, without samples, of the posterior mean."""
    model.eval()
    if samples:
        outputs = model.predict(digits.pixels, num_samples=samples, likelihood="logits").mean
    else:
        outputs = (model.module if isinstance(model, bnnify.BayesianModel) else model)(digits.pixels)
    return 100 * (outputs.argmax(1) != digits.labels).double().mean().item()


def load(data: Path | None, device: str) -> dict[str, Images]:
    """Digits as the paper feeds them to its networks: 784 pixels, divided by 126."""
    train, test = mnist(True, data), mnist(False, data)
    parts = {"train": train.take(TRAIN), "validation": train.take(VALIDATION), "test": test}
    return {
        name: Images(part.pixels.flatten(1).to(device).float() / 126, part.labels.to(device))
        for name, part in parts.items()
    }


def _options() -> argparse.Namespace:
    parser = report.parser(__doc__, kept=True)
    add = parser.add_argument
    add("--data", type=Path, help="folder with MNIST in it; else torchvision downloads it")
    add("--epochs", type=int, default=5, help="length of each training; the paper's is 600")
    add("--widths", type=int, nargs="+", default=[400, 800, 1200], help="units of each hidden layer")
    add("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD", help="which networks")
    add("--samples", type=int, default=10, help="draws of the weights in an ensemble")
    add("--beta", type=float, default=1.0, help="weight of the KL; 1 is the paper's")
    add("--seed", type=int, default=0)
    add("--checkpoints", type=Path, help="folder in which to keep each network after each epoch, and to go on from")
    add("--figures", type=Path, help="folder for the paper's figures, of the networks of the last width")
    add("--compile", action="store_true", help="compile the forward: faster, after half a minute for each network")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
