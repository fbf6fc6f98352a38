"""Measures how the cost of a conversion grows with the model, and the cost of using it with layers, K and the batch."""

from __future__ import annotations

import argparse
import copy
import math
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torchvision
from torch import nn

import bnnify

from ..harness import comparison, peers
from ..harness.comparison import RATIOS, Calls
from ..harness.interleaved import interleaved, milliseconds, summary
from ..harness.report import Table, digits, quartiles
from .convert_plots import plot
from .scaling import batch, layers, samples

PRIORS = {"Gaussian": bnnify.Gaussian(std=0.1), "Pretrained": bnnify.Pretrained()}


def main() -> None:
    options = _options()
    run = comparison.begin(options)
    results: dict[str, Any] = {}
    tables: list[Table] = []
    for name in options.parts:
        results[name], table = PARTS[name](options)
        tables.append(table)
        run.record(results)
    run.show(*tables, notes=[f"{options.rounds} rounds; {RATIOS}"])
    if options.plots:
        plot(results, options.plots)


def size(options: argparse.Namespace) -> tuple[Any, Table]:
    """MLPs of eight square layers, each converted in a process of its own: a peak cannot be taken back."""
    found = []
    for device, largest in (("cpu", options.largest), ("meta", 10 * options.largest)):
        for exponent in range(5, round(math.log10(largest)) + 1):
            for prior in PRIORS:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                    made = process.submit(_converted_once, 10**exponent, device, prior, options.threads)
                    found.append(made.result())
    headings = ["", "prior", "weights", "ms", "ns a weight", "peak memory added, × the model", "tensors", "bytes"]
    rows = [
        [
            *(row["device"], row["prior"], f"{row['weights']:,}", digits(row["ms"])),
            digits(1e6 * row["ms"] / row["weights"]),
            f"{row['peak'] / (4 * row['weights']):.2f}" if row["device"] == "cpu" else "",
            f"+{row['tensors']:g} each",
            f"+{row['bytes']:g} ×",
        ]
        for row in found
    ]
    return found, Table("Conversion in place, by the number of weights", headings, rows, names=2)


def _converted_once(number: int, device: str, prior: str, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    width = round(math.sqrt(number / 8))
    bnnify.convert(nn.Linear(2, 2), prior=PRIORS[prior])  # for whatever happens only at the first call
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(width, width) for _ in range(8)))
    if device != "meta":
        model.to_empty(device=device)
        for parameter in model.parameters():
            nn.init.constant_(parameter, 0.01)  # memory to which nothing was written is not counted
    plain, before = list(model.parameters()), _peak_memory()
    convert = partial(bnnify.convert, model, prior=PRIORS[prior], inplace=True)
    times = [milliseconds(convert)]
    peak, after = _peak_memory() - before, list(model.parameters())
    while len(times) < 3 or (sum(times) < 1000 and len(times) < 21):
        bnnify.collapse(model, inplace=True)
        times.append(milliseconds(convert))
    nbytes = sum(parameter.nbytes for parameter in plain)
    return {
        **{"device": device, "prior": prior, "weights": nbytes // 4, "ms": median(times), "times": times, "peak": peak},
        "tensors": len(after) / len(plain) - 1,
        "bytes": sum(parameter.nbytes for parameter in after) / nbytes - 1,
    }


def _peak_memory() -> int:
    """In bytes, from Linux. (A process would inherit the `ru_maxrss` of the one that started it.)"""
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0])


def libraries(options: argparse.Namespace) -> tuple[Any, Table]:
    """A plain copy, our conversion of a copy, and bayesian-torch's, which is in place and so gets a copy too."""
    from bayesian_torch.models.dnn_to_bnn import dnn_to_bnn

    network = torchvision.models.resnet18()
    settings = peers.bayesian_torch_settings("Reparameterization")
    calls: Calls = {
        "copy.deepcopy": partial(copy.deepcopy, network),
        "bnnify.convert": partial(bnnify.convert, network),
        "bnnify.convert, Gaussian prior": partial(bnnify.convert, network, prior=PRIORS["Gaussian"]),
        "copy.deepcopy and dnn_to_bnn": lambda: dnn_to_bnn(copy.deepcopy(network), settings),
    }
    found = summary(interleaved(calls, options.rounds, description="libraries"), ["copy.deepcopy"])
    rows = [[name, digits(row["median ms"]), quartiles(row["ratio"]["copy.deepcopy"])] for name, row in found.items()]
    return found, Table("Conversion of torchvision's resnet18", ["", "ms", "× copy.deepcopy"], rows)


PARTS = {"size": size, "libraries": libraries, "layers": layers, "samples": samples, "batch": batch}


def _options() -> argparse.Namespace:
    parser = comparison.parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--largest", type=float, default=1e9, help="weights of the largest model; 10 × on meta")
    parser.add_argument("--plots", type=Path, help="folder for the figures, such as docs/figures")
    return parser.parse_args()


if __name__ == "__main__":
    main()
