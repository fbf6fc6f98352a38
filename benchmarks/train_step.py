"""Times a training step of deterministic and Bayesian networks, and what it saves for its backward pass.

A step is zero_grad, forward, KL, loss and backward. The optimizer is timed apart, with `--optimizer`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import peers
import reporting
import torch
from interleaved import drop_failing, interleaved, summary
from peers import Bayesian
from saved_tensors import nbytes, saved_bytes
from torch import Tensor
from torch.nn import functional as F
from workloads import ON_CPU, WORKLOADS

import bnnify

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
COMPILED, INDUCTOR = ", compiled", ", compiled, inductor's RNG"
REFERENCES = ("deterministic", "deterministic" + COMPILED, "bayesian-torch")


def main() -> None:
    options = _options()
    reporting.prepare(options)
    {"steps": steps, "optimizer": optimizer, "memory": memory}[options.table](options)


def steps(options: argparse.Namespace) -> None:
    """Every variant of every workload, in turn."""
    results: dict[str, Any] = {}
    notes = [ATTENTION] if "W4" in options.workloads else []
    for key in options.workloads:
        networks = _networks(key, options)
        if options.compile:
            torch.compiler.reset()
            networks |= _compiled(networks, options.device)
        batch = _batch(key, options)
        calls = {name: step(network, batch, options.dtype) for name, network in networks.items()}
        compiled = [name for name in calls if COMPILED in name]
        notes += [f"{key}, {reason}" for reason in drop_failing(calls, compiled)]
        measured = interleaved(calls, options.rounds, options.device, at_least=options.at_least, description=key)
        rows = summary(measured, [name for name in REFERENCES if name in calls])
        results[f"{key}: {WORKLOADS[key].description}"] = {
            name: {"weights": networks[name].weights} | row for name, row in rows.items()
        }
        report = reporting.report(options, results)  # now, so that an interrupted run leaves what it has measured
    title = f"Training step without the optimizer, {options.dtype}"
    reporting.show(report, reporting.ratio_part(title, results), notes=notes)


def optimizer(options: argparse.Namespace) -> None:
    """A step of Adam on the parameters of W1."""
    calls: dict[str, Callable[[], object]] = {}
    networks, batch = _networks("W1", options, ("deterministic", "bnnify")), _batch("W1", options)
    for fused in (False, True):
        for name, network in networks.items():
            loss(network, batch).backward()
            adam = torch.optim.Adam(network.model.parameters(), lr=1e-6, fused=fused)
            calls[f"{name}, Adam(fused={fused})"] = adam.step
    measured = interleaved(calls, options.rounds, options.device)
    results = {f"W1: {WORKLOADS['W1'].description}": summary(measured, [*calls][:2])}
    report = reporting.report(options, results)
    reporting.show(report, reporting.ratio_part("The optimizer's part of a step", results))


def memory(options: argparse.Namespace) -> None:
    """The bytes that W1 has beyond the deterministic network, in units of its Bayesian weights."""
    results: dict[str, dict[str, float]] = {}
    networks, batch = _networks("W1", options), _batch("W1", options)
    unit = 4 * max(network.weights for network in networks.values())
    for name, network in networks.items():
        parameters, buffers = list(network.model.parameters()), list(network.model.buffers())
        forward = partial(loss, network, batch, options.dtype)
        results[name] = {
            "saved for backward": saved_bytes(forward, [*batch, *parameters, *buffers]),
            "parameters": nbytes(parameters),
            "buffers": nbytes(buffers),
        }
    report = reporting.report(options, results)
    plain = results["deterministic"]
    rows = [[name, *(f"{(row[what] - plain[what]) / unit:.2f}" for what in row)] for name, row in results.items()]
    title = f"Memory of W1 beyond the deterministic network, in N × 4 bytes (N = {unit // 4:,} Bayesian weights)"
    reporting.show(report, reporting.Part(title, ["", *plain], rows, results))


def loss(network: Bayesian, batch: Batch, dtype: str = "float32") -> Tensor:
    """The negative ELBO, with the KL that the library computes."""
    inputs, labels = batch
    with reporting.autocast(inputs.device.type, dtype):
        output, kl = network.forward(inputs)
        nll = F.cross_entropy(output, labels)
    return nll if kl is None else bnnify.elbo(nll, kl, NUM_DATA)


def step(network: Bayesian, batch: Batch, dtype: str = "float32") -> Callable[[], None]:
    """A training step but for the optimizer's part."""

    def call() -> None:
        network.model.zero_grad(set_to_none=True)
        loss(network, batch, dtype).backward()

    return call


def _batch(key: str, options: argparse.Namespace) -> Batch:
    inputs, labels = WORKLOADS[key].inputs(options.device), WORKLOADS[key].labels(options.device)
    if options.channels_last and inputs.ndim == 4:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    return inputs, labels


def _networks(key: str, options: argparse.Namespace, names: Sequence[str] = ()) -> dict[str, Bayesian]:
    network = WORKLOADS[key].build().train()
    return {
        name: peers.variant(name, network, options.device, options.channels_last)
        for name in names or reporting.chosen(options, VARIANTS[key])
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
    parser = reporting.parser(__doc__)
    reporting.add_networks(parser, list(WORKLOADS), ON_CPU)
    parser.add_argument("--compile", action="store_true", help="add rows with torch.compile")
    for table, text in (("optimizer", "time Adam instead"), ("memory", "count bytes instead")):
        parser.add_argument(f"--{table}", action="store_const", dest="table", const=table, default="steps", help=text)
    return parser.parse_args()


if __name__ == "__main__":
    main()
