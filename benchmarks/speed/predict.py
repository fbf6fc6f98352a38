"""Times the predictive distribution from K networks against the forward of a deterministic one.

The deterministic network runs once per batch; over several batches it passes K times over all of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import bnnify

from ..harness import comparison, peers
from ..harness.comparison import COMPILED, Calls
from ..harness.networks.workloads import WORKLOADS


@dataclass(frozen=True)
class Task:
    """What is predicted, with which network."""

    description: str
    workload: str
    batch: int
    batches: int = 1
    only: str | None = None
    """The one layer that is Bayesian."""
    classes: int = 0
    """How many outputs a last layer `fc` has that takes the place of the network's own."""
    size: int = 0
    """The height and width of the images, if not those of the workload."""

    def network(self) -> Any:
        network: Any = WORKLOADS[self.workload].build()
        if self.classes:
            network.fc = nn.Linear(network.fc.in_features, self.classes)
        return network.eval()

    def inputs(self, options: argparse.Namespace) -> list[Tensor]:
        workload = WORKLOADS[self.workload]
        if self.size:
            workload = replace(workload, input_shape=(3, self.size, self.size))
        return [workload.inputs(options.device, self.batch) for _ in range(self.batches)]


TASKS = {
    "batch-128": Task("W1, one batch of 128", "W1", 128),
    "batch-1": Task("W1, one input", "W1", 1),
    "loader": Task("W1, ten batches of 128, against K deterministic passes", "W1", 128, batches=10),
    "only-fc": Task("W3, only the last layer Bayesian", "W3", 16, only="fc"),
    "only-fc-10": Task("W3 with 10 classes, only the last layer Bayesian", "W3", 16, only="fc", classes=10),
    "only-fc-224": Task("W3 at 224×224, only the last layer Bayesian", "W3", 16, only="fc", size=224),
}
QUICK = [key for key, task in TASKS.items() if not task.size]
VARIANTS = ("bnnify", "bnnify-antithetic", "bnnify-frozen", "bnnify-closed-form", "bayesian-torch", "torchbnn", "blitz")


def main() -> None:
    options = _options()
    run = comparison.begin(options)
    descriptions = {key: TASKS[key].description for key in options.workloads}
    title = f"Prediction from K = {options.samples} networks, {options.dtype}"
    comparison.compare(run, title, descriptions, lambda key: _calls(TASKS[key], options))


def _calls(task: Task, options: argparse.Namespace) -> tuple[Calls, dict[str, int]]:
    """What is timed, and how many weights are Bayesian in it, by the names of the rows."""
    network = task.network()
    inputs = task.inputs(options)
    calls: Calls = {}
    weights: dict[str, int] = {}
    names = [n for n in comparison.chosen(options, VARIANTS) if task.only or n != "bnnify-closed-form"]
    ours = [name for name in names if name.startswith(("deterministic", "bnnify"))]
    for name in [*names, *(name + COMPILED for name in ours if options.compile)]:
        row = name.removesuffix(COMPILED)
        kind = "bnnify" if row.startswith("bnnify") else row
        made = peers.variant(kind, network, options.device, options.channels_last, task.only)
        predict = _prediction(row, made.model.eval(), inputs, options, compiled=row != name)
        calls[name] = torch.no_grad()(comparison.autocast(options.device, options.dtype)(predict))
        weights[name] = made.weights
    return calls, weights


def _prediction(
    row: str, model: Any, inputs: list[Tensor], options: argparse.Namespace, compiled: bool
) -> Callable[[], object]:
    """What predicts on all batches; bnnify through a loader where there are several.

    The data set of that loader is the list of batches, which costs nothing.
    """
    samples = options.samples
    if row == "bnnify-frozen":
        model = bnnify.freeze(model, samples)
    if compiled:
        how = {} if options.device == "cpu" else {"mode": "reduce-overhead"}
        (model.module if isinstance(model, bnnify.BayesianModel) else model).compile(**how)
    if row == "deterministic":
        passes = 1 if len(inputs) == 1 else samples
        return lambda: [model(batch) for _ in range(passes) for batch in inputs]
    if row == "bnnify-frozen":
        return lambda: [model(batch).softmax(-1).mean(0) for batch in inputs]
    if not isinstance(model, bnnify.BayesianModel):
        return lambda: [peers.average(model, batch, samples) for batch in inputs]
    data = inputs[0] if len(inputs) == 1 else DataLoader(inputs, batch_size=None)
    settings = {"bnnify-antithetic": {"antithetic": True}, "bnnify-closed-form": {"closed_form": True}}.get(row, {})
    return lambda: model.predict(data, samples, likelihood="logits", **settings)


def _options() -> argparse.Namespace:
    parser = comparison.parser(__doc__)
    comparison.add_networks(parser, list(TASKS), QUICK)
    parser.add_argument("--samples", type=int, default=10, help="K, the number of networks")
    return parser.parse_args()


if __name__ == "__main__":
    main()
