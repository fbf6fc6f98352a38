"""Times a training step of deterministic and Bayesian networks, and what it saves for its backward pass.

A step is zero_grad, forward, KL, loss and backward. The optimizer is timed apart, with `--optimizer`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import bnnify

from ..harness import comparison, peers
from ..harness.comparison import COMPILED, RATIOS, Calls
from ..harness.interleaved import interleaved, summary
from ..harness.networks.workloads import ON_CPU, WORKLOADS
from ..harness.peers import Bayesian
from ..harness.report import Run, Table
from ..harness.saved_tensors import nbytes, saved_bytes

Batch = tuple[Tensor, Tensor]

NUM_DATA = 50_000
EVERYWHERE = ("deterministic", "bnnify", "bnnify-gaussian")
ESTIMATORS = ("bnnify-flipout", "bnnify-local")
LIBRARIES = ("bayesian-torch", "bayesian-torch-flipout", "torchbnn", "blitz")
VARIANTS = {
    "W1": (*EVERYWHERE, "bnnify-mixture", *ESTIMATORS, *LIBRARIES),
    "W2": (*EVERYWHERE, *ESTIMATORS, *LIBRARIES),
    "W3": (*EVERYWHERE, *LIBRARIES),
    "W4": (*EVERYWHERE, "bnnify-linear", *LIBRARIES),
    "W5": ("deterministic", "bnnify", "bayesian-torch"),
}
ATTENTION = "W4: no library but bnnify makes attention Bayesian; bnnify-linear leaves it alone as they do."
INDUCTOR = COMPILED + ", inductor's RNG"


def main() -> None:
    options = _options()
    {"steps": steps, "optimizer": optimizer, "memory": memory}[options.table](comparison.begin(options))


def steps(run: Run) -> None:
    """Every variant of every workload, in turn."""
    options = run.options

    def make(key: str) -> tuple[Calls, dict[str, int]]:
        networks = _networks(key, options)
        if options.compile:
            networks |= _compiled(networks, options.device)
        batch = _batch(key, options)
        calls = {name: step(network, batch, options.dtype) for name, network in networks.items()}
        return calls, {name: network.weights for name, network in networks.items()}

    descriptions = {key: _described(key) for key in options.workloads}
    title = f"Training step without the optimizer, {options.dtype}"
    comparison.compare(run, title, descriptions, make, notes=[ATTENTION] if "W4" in options.workloads else [])


def optimizer(run: Run) -> None:
    """A step of Adam on the parameters of W1."""
    options = run.options
    calls: Calls = {}
    networks, batch = _networks("W1", options, ("deterministic", "bnnify")), _batch("W1", options)
    for fused in (False, True):
        for name, network in networks.items():
            loss(network, batch).backward()
            adam = torch.optim.Adam(network.model.parameters(), lr=1e-6, fused=fused)
            calls[f"{name}, Adam(fused={fused})"] = adam.step
    measured = interleaved(calls, options.rounds, options.device)
    results = {_described("W1"): summary(measured, [*calls][:2])}
    run.record(results)
    table = comparison.ratio_table("The optimizer's part of a step", results)
    run.show(table, notes=[f"{options.rounds} rounds; {RATIOS}"])


def memory(run: Run) -> None:
    """The bytes that W1 has beyond the deterministic network, in units of its Bayesian weights."""
    results: dict[str, dict[str, float]] = {}
    networks, batch = _networks("W1", run.options), _batch("W1", run.options)
    unit = 4 * max(network.weights for network in networks.values())
    for name, network in networks.items():
        parameters, buffers = list(network.model.parameters()), list(network.model.buffers())
        forward = partial(loss, network, batch, run.options.dtype)
        results[name] = {
            "saved for backward": saved_bytes(forward, [*batch, *parameters, *buffers]),
            "parameters": nbytes(parameters),
            "buffers": nbytes(buffers),
        }
    run.record(results)
    plain = results["deterministic"]
    rows = [[name, *(f"{(row[what] - plain[what]) / unit:.2f}" for what in row)] for name, row in results.items()]
    title = f"Memory of W1 beyond the deterministic network, in N × 4 bytes (N = {unit // 4:,} Bayesian weights)"
    run.show(Table(title, ["", *plain], rows))


def loss(network: Bayesian, batch: Batch, dtype: str = "float32") -> Tensor:
    """The negative ELBO, with the KL that the library computes."""
    inputs, labels = batch
    with comparison.autocast(inputs.device.type, dtype):
        output, kl = network.forward(inputs)
        nll = F.cross_entropy(output, labels)
    return nll if kl is None else bnnify.elbo(nll, kl, NUM_DATA)


def step(network: Bayesian, batch: Batch, dtype: str = "float32") -> Callable[[], None]:
    """A training step but for the optimizer's part."""

    def call() -> None:
        network.model.zero_grad(set_to_none=True)
        loss(network, batch, dtype).backward()

    return call


def _described(key: str) -> str:
    return f"{key}: {WORKLOADS[key].description}"


def _batch(key: str, options: argparse.Namespace) -> Batch:
    inputs, labels = WORKLOADS[key].inputs(options.device), WORKLOADS[key].labels(options.device)
    if options.channels_last and inputs.ndim == 4:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    return inputs, labels


def _networks(key: str, options: argparse.Namespace, names: Sequence[str] = ()) -> dict[str, Bayesian]:
    network = WORKLOADS[key].build().train()
    return {
        name: peers.variant(name, network, options.device, options.channels_last)
        for name in names or comparison.chosen(options, VARIANTS[key])
    }


def _compiled(networks: dict[str, Bayesian], device: str) -> dict[str, Bayesian]:
    """Compiled forms of the deterministic network and of bnnify's, with the same parameters."""
    ours = {name: network for name, network in networks.items() if name.startswith(("deterministic", "bnnify"))}
    if device != "cpu":
        settings: dict[str, dict[str, Any]] = {COMPILED: {"mode": "reduce-overhead"}}
    else:
        # Inductor's own random numbers are slow on a CPU; torch's are what eager code uses.
        settings = {COMPILED: {"options": {"fallback_random": True}}, INDUCTOR: {}}
    return {
        name + suffix: replace(network, forward=torch.compile(network.forward, fullgraph=True, **how))
        for suffix, how in settings.items()
        for name, network in ours.items()
        if suffix == COMPILED or name == "bnnify"
    }


def _options() -> argparse.Namespace:
    parser = comparison.parser(__doc__)
    comparison.add_networks(parser, list(WORKLOADS), ON_CPU)
    for table, text in (("optimizer", "time Adam instead"), ("memory", "count bytes instead")):
        parser.add_argument(f"--{table}", action="store_const", dest="table", const=table, default="steps", help=text)
    return parser.parse_args()


if __name__ == "__main__":
    main()
