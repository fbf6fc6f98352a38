"""How the time of training and predicting grows with the layers, with the number of networks and with the batch."""

from __future__ import annotations

import argparse
import copy
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

import bnnify

from ..harness import peers
from ..harness.comparison import Calls
from ..harness.interleaved import Rounds, interleaved, ratios
from ..harness.networks.workloads import WORKLOADS
from ..harness.report import Table, digits, quartiles
from .train_step import step

LAYERS = (10, 30, 100, 300, 1000, 3000)
SAMPLES = (1, 2, 5, 10, 20, 50, 100)
BATCHES = (1, 4, 16, 64, 256, 1024)
W1 = WORKLOADS["W1"]


def layers(options: argparse.Namespace) -> tuple[Any, Table]:
    """Networks of layers of 16 units, in which what a layer costs by being one is all there is."""
    found = []
    inputs, labels = torch.randn(1, 16), torch.zeros(1, dtype=torch.long)
    for count in LAYERS:
        network = nn.Sequential(*(nn.Linear(16, 16) for _ in range(count)))
        variants = {name: peers.variant(name, network) for name in ("deterministic", "bnnify")}
        calls: Calls = {
            "copy.deepcopy": partial(copy.deepcopy, network),
            "convert": partial(bnnify.convert, network),
            **{f"{name} step": step(variant, (inputs, labels)) for name, variant in variants.items()},
            "prediction, K = 10": partial(variants["bnnify"].model.predict, inputs, 10),
        }
        found.append({"layers": count, **_medians(interleaved(calls, options.rounds, description=f"{count} layers"))})
    names = list(found[0])[1:]
    rows = [[f"{row['layers']:,}", *(digits(1000 * row[name] / row["layers"]) for name in names)] for row in found]
    headings = ["layers", *(f"{name}, µs a layer" for name in names)]
    return found, Table("By the number of layers: nn.Linear(16, 16), one input", headings, rows)


def samples(options: argparse.Namespace) -> tuple[Any, Table]:
    network, inputs = W1.build().eval(), W1.inputs("cpu")
    bnn = bnnify.convert(network)
    calls: Calls = {"0": torch.no_grad()(partial(network, inputs))}
    calls |= {str(number): partial(bnn.predict, inputs, number, likelihood="logits") for number in SAMPLES}
    measured = interleaved(calls, options.rounds, description="networks")
    found = [
        {"K": number, "ms": median(measured[str(number)]), "ratio": ratios(measured, str(number), "0")}
        for number in SAMPLES
    ]
    rows = [[str(row["K"]), digits(row["ms"]), digits(row["ms"] / row["K"]), quartiles(row["ratio"])] for row in found]
    headings = ["K", "ms", "ms a network", "× a deterministic forward"]
    return found, Table("Prediction by the number of networks K: W1, one batch of 128", headings, rows)


def batch(options: argparse.Namespace) -> tuple[Any, Table]:
    network = W1.build()
    names = ("deterministic", "bnnify", "bayesian-torch")
    variants = {name: peers.variant(name, network) for name in names}
    found = []
    for number in BATCHES:
        data = W1.inputs("cpu", number), W1.labels("cpu", number)
        calls = {name: step(variant, data) for name, variant in variants.items()}
        measured = interleaved(calls, options.rounds, description=f"batch of {number}")
        ratio = {name: ratios(measured, name, "deterministic") for name in names[1:]}
        found.append({"batch": number, "ms": _medians(measured), "ratio": ratio})
    rows = [
        [f"{row['batch']:,}", *(digits(row["ms"][name]) for name in names), *map(quartiles, row["ratio"].values())]
        for row in found
    ]
    headings = ["batch", *(f"{name}, ms" for name in names), *(f"{name}, × deterministic" for name in names[1:])]
    return found, Table("Training step without the optimizer, by the batch size: W1", headings, rows)


def _medians(measured: Rounds) -> dict[str, float]:
    return {name: median(times) for name, times in measured.items()}
