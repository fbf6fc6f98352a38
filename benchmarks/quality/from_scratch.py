"""Trains fresh networks by the ELBO, by the loop of the README and by that of the recipes, beside ordinary training."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnnify

from ..harness import report
from ..harness.evaluation import evaluate, logits
from ..harness.fit import cross_entropy, fit, shuffled
from ..harness.networks.larger_networks import LARGER_NETWORKS
from ..harness.networks.small_networks import BATCH_SIZE, NETWORKS, Network
from ..harness.report import Rows, Table, spread


@dataclass(frozen=True)
class Method:
    """How a converted network is trained by the ELBO."""

    rho_lr: float = 10.0
    """The learning rate of ρ, as a multiple of that of the means."""
    warmup: float = 0.0
    """Share of the training in which the weight of the KL rises from 0."""
    beta: float = 1.0
    """The weight of the KL after that."""


EPOCHS = {"MLP 2x400, MNIST": 10, "batch-norm CNN, CIFAR-10": 8, "LSTM, SST-2": 1, "transformer, Fashion": 6}
"""The networks, and how long each is trained: as long as the time allowed."""
METHODS: dict[str, Method | None] = {
    "ordinary training": None,
    "ELBO, as in the README": Method(),
    "ELBO, recipe": Method(rho_lr=1.0, warmup=0.5),
    "ELBO, recipe, tempered": Method(rho_lr=1.0, warmup=0.5, beta=0.1),
}
JUDGED = 2_000


def main() -> None:
    report.run(_options(), ("torch", "bnnify"), compare, _tables)


def compare(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What each network scores after its training, by each of the methods."""
    networks = {network.name: network for network in (*NETWORKS, *LARGER_NETWORKS)}
    for seed in range(options.seeds):
        for name in options.only:
            network = networks[name]
            train, judged = parts(network, options)
            for label in options.methods:
                method = METHODS[label]
                torch.manual_seed(seed)
                model = network.build()
                if method is not None:
                    model = bnnify.convert(model)
                started = time.process_time()
                _train(model, method, network, train, options.epochs or EPOCHS[name])
                minutes = (time.process_time() - started) / 60
                metrics = evaluate(_probabilities(model, judged[0], options.networks), judged[1], resamples=1)
                scores = {"accuracy": 100 * metrics.accuracy, "NLL": metrics.nll, "ECE": metrics.ece}
                yield {"network": name, "method": label, "seed": seed, "processor minutes": minutes} | scores


def parts(network: Network, options: argparse.Namespace) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What is trained on, and what is judged by: test data, or the training data after those that are trained on."""
    count = options.images or network.num_train
    more = min(count, JUDGED)
    if not options.validate:
        return network.images(True, options.data, count), network.images(False, options.data, more)
    inputs, labels = network.images(True, options.data, count + more)
    return (inputs[:count], labels[:count]), (inputs[count:], labels[count:])


def _train(model: nn.Module, method: Method | None, network: Network, data: tuple[Tensor, Tensor], epochs: int) -> None:
    """Adam with one cycle of the learning rates, without early stopping."""
    steps = epochs * (len(data[0]) // BATCH_SIZE)
    if method is None:
        optimizer, rates = torch.optim.Adam(model.parameters(), fused=True), [network.lr]
    else:
        rates = [network.lr, method.rho_lr * network.lr]
        optimizer = torch.optim.Adam(model.parameter_groups(lr=rates[0], rho_lr=rates[1]), fused=True)
        rates = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, pct_start=0.1)

    def elbo(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        output, kl = model(inputs)
        beta = bnnify.linear_warmup(schedule.last_epoch, round(method.warmup * steps), method.beta)
        return bnnify.elbo(F.cross_entropy(output, labels), kl, num_data=len(data[0]), beta=beta)

    loss = cross_entropy if method is None else elbo
    indices = shuffled(len(data[0]), BATCH_SIZE, steps)
    fit(model, optimizer, data, indices, loss, schedule=schedule, steps=steps, description=network.name)


def _probabilities(model: nn.Module, inputs: Tensor, networks: int) -> Tensor:
    if isinstance(model, bnnify.BayesianModel):
        return model.predict(list(inputs.split(500)), networks, likelihood="logits", seed=0).mean
    return logits(model, inputs).softmax(1)


def _tables(rows: Rows) -> list[Table]:
    cells: list[list[str]] = []
    for name in dict.fromkeys(row["network"] for row in rows):
        cells.append([name])
        for method in METHODS:
            found = [row for row in rows if (row["network"], row["method"]) == (name, method)]
            if found:
                figures = [spread([row[key] for row in found], places) for key, places in _SCORES.items()]
                cells.append([method, *figures, f"{fmean(row['processor minutes'] for row in found):.1f}"])
    return [Table("From random weights", ["training", "accuracy, %", "NLL", "ECE", "minutes of\na processor"], cells)]


_SCORES = {"accuracy": 1, "NLL": 3, "ECE": 3}


def _options() -> argparse.Namespace:
    parser = report.parser(__doc__, kept=True)
    parser.add_argument("--data", type=Path, help="folder of the archives; default: what torchvision downloads")
    parser.add_argument(
        "--only", nargs="+", choices=EPOCHS, default=list(EPOCHS), metavar="NETWORK", help="which networks"
    )
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help="ways to train"
    )
    parser.add_argument("--seeds", type=int, default=1, help="initialisations and trainings")
    parser.add_argument("--images", type=int, help="to train on; default: those of each network")
    parser.add_argument("--epochs", type=int, help="default: 10, 8, 1 and 6")
    parser.add_argument("--validate", action="store_true", help="judge by training data that are not trained on")
    parser.add_argument("--networks", type=int, default=20, help="networks that a prediction averages over")
    return parser.parse_args()


if __name__ == "__main__":
    main()
