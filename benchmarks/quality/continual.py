"""Permuted MNIST, one task after another: the posterior as the next prior, beside fine-tuning and an L2 penalty.

Goodfellow et al. 2013; the protocol of Nguyen et al. 2018, "Variational Continual Learning", without a coreset.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnnify

from ..harness import report
from ..harness.data import mnist, normalize
from ..harness.fit import cross_entropy, fit, shuffled
from ..harness.progress import track
from ..harness.report import Rows, Table, spread

BATCH_SIZE = 100
Task = tuple[Tensor, Tensor]
Learner = Callable[[nn.Module | None, Task, int], nn.Module]
"""From the model after the last task (None before the first), the next task and a number of epochs to the model."""


def main() -> None:
    report.run(_options(), ("torch", "bnnify"), compare, _tables)


def compare(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What each method knows of all tasks after the last, with its best setting.

    That is the one which is best on training images that are not trained on, under permutations of their own.
    """
    train = mnist(True, options.data)
    held_out, test = train.take(slice(50_000, 60_000)), mnist(False, options.data)
    train = train.take(slice(options.images))
    for method, settings in METHODS.items():
        scores = {}
        for setting, learner in track(settings.items() if len(settings) > 1 else (), f"{method}: settings"):
            permutations = _permutations(options.tasks, seed=1_000)
            scores[setting] = sum(_learned(learner, permutations, train, held_out, options.epochs, seed=1_000))
        best = max(scores, key=scores.__getitem__, default=next(iter(settings)))
        for seed in track(range(options.seeds), f"{method}: seeds"):
            accuracies = _learned(settings[best], _permutations(options.tasks, seed), train, test, options.epochs, seed)
            yield {"method": method, "setting": best, "seed": seed, "accuracies": accuracies}


def _learned(
    learner: Learner, permutations: list[Tensor], train: Any, test: Any, epochs: int, seed: int
) -> list[float]:
    """The accuracy on each task, in %, after all of them were learned in turn."""
    torch.manual_seed(seed)
    pixels, labels = normalize(train.pixels, (0.0,), (1.0,)).flatten(1), train.labels
    model: nn.Module | None = None
    for permutation in permutations:
        model = learner(model, (pixels[:, permutation], labels), epochs)
    assert model is not None
    judged = normalize(test.pixels, (0.0,), (1.0,)).flatten(1)
    return [
        100 * (_predicted(model, judged[:, permutation]) == test.labels).double().mean().item()
        for permutation in permutations
    ]


@torch.no_grad()
def _predicted(model: nn.Module, inputs: Tensor) -> Tensor:
    if isinstance(model, bnnify.BayesianModel):
        return model.predict(inputs, 20, likelihood="logits", seed=0).mean.argmax(1)
    return model.eval()(inputs).argmax(1)


def _permutations(tasks: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(784, generator=generator) for _ in range(tasks)]


def _network() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))


def _plain(strength: float, model: nn.Module | None, task: Task, epochs: int) -> nn.Module:
    """Fine-tunes; the penalty is ``strength/2`` times the squared distance from the weights after the last task."""
    start = None if model is None else [parameter.detach().clone() for parameter in model.parameters()]
    model = _network() if model is None else model

    def loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        value = cross_entropy(model, inputs, labels)
        if start is None or not strength:
            return value
        distances = [(now - was).square().sum() for now, was in zip(model.parameters(), start, strict=True)]
        return value + 0.5 * strength * torch.stack(distances).sum()

    _train(model, [{"params": list(model.parameters()), "lr": 1e-3}], task, epochs, loss)
    return model


def _bayesian(prior_std: float, posterior_std: float, model: nn.Module | None, task: Task, epochs: int) -> nn.Module:
    """Trains by the ELBO; the prior is the posterior after the last task."""
    if model is None:
        bnn = bnnify.convert(_network(), prior=bnnify.Gaussian(std=prior_std), posterior_std=posterior_std)
    else:
        bnn = bnnify.convert(bnnify.collapse(model), prior=bnnify.posterior_of(model))

    def loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        output, kl = model(inputs)
        return bnnify.elbo(F.cross_entropy(output, labels), kl, num_data=len(task[0]))

    _train(bnn, bnn.parameter_groups(lr=1e-3, rho_lr=1e-2), task, epochs, loss)
    return bnn


def _train(model: nn.Module, groups: list[dict[str, Any]], task: Task, epochs: int, loss: Any) -> None:
    steps = epochs * len(task[0]) // BATCH_SIZE
    optimizer = torch.optim.Adam(copy.copy(groups))
    fit(model, optimizer, task, shuffled(len(task[0]), BATCH_SIZE, steps), loss, steps=steps)


METHODS: dict[str, dict[str, Learner]] = {
    "fine-tuning": {"": partial(_plain, 0.0)},
    "L2 to the last weights": {f"{strength:g}": partial(_plain, strength) for strength in (0.001, 0.01, 0.1, 1.0)},
    "posterior as prior": {
        f"prior std {prior:g}, σ {std:g}": partial(_bayesian, prior, std)
        for prior in (0.1, 0.3)
        for std in (0.01, 0.03)
    },
}
"""Of each method as many settings as of the others, but for fine-tuning, which has none."""


def _tables(rows: Rows) -> list[Table]:
    cells = []
    for method in dict.fromkeys(row["method"] for row in rows):
        found = [row for row in rows if row["method"] == method]
        by_task = list(zip(*(row["accuracies"] for row in found), strict=True))
        means = [sum(row["accuracies"]) / len(row["accuracies"]) for row in found]
        columns = [spread(list(task), 1) for task in by_task]
        cells.append([method, found[0]["setting"], *columns, spread(means, 1)])
    tasks = [f"task {number}" for number in range(1, len(cells[0]) - 2)]
    return [Table("Accuracy after the last task, %", ["method", "setting", *tasks, "mean"], cells, names=2)]


def _options() -> argparse.Namespace:
    parser = report.parser(__doc__, kept=True)
    parser.add_argument("--data", type=Path, help="folder of the archives; default: what torchvision downloads")
    parser.add_argument("--tasks", type=int, default=5, help="permutations of the pixels")
    parser.add_argument("--images", type=int, default=20_000, help="training images of each task")
    parser.add_argument("--epochs", type=int, default=10, help="of each task")
    parser.add_argument("--seeds", type=int, default=1, help="permutations and networks")
    return parser.parse_args()


if __name__ == "__main__":
    main()
