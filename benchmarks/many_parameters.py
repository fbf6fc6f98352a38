"""How long models with many parameters take to convert, save, load, report and run: it should grow as their number."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import reporting
import torch
from reporting import Part, digits
from torch import Tensor, nn

import bnnify

PARAMETERS = (1_000, 3_000, 10_000)
LAYERS = ("query", "key", "value", "output", "up", "down")
SAMPLES = 2


class Block(nn.ModuleDict):
    """The layers of a transformer's block, called one after another."""

    def __init__(self) -> None:
        super().__init__({name: nn.Linear(4, 4) for name in LAYERS})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.values():
            x = layer(x)
        return x


def network(parameters: int) -> nn.Sequential:
    return nn.Sequential(*(Block() for _ in range(parameters // (2 * len(LAYERS)) + 1)))


def main() -> None:
    options = _options()
    reporting.prepare(options)
    found = []
    for parameters in options.parameters:
        found.append(measure(parameters))
        made = reporting.report(options, {"rows": found})  # now, so that an interrupted run leaves what it has measured
    rows = [[f"{row['parameters']:,}", *(digits(seconds) for seconds in list(row.values())[1:])] for row in found]
    headings = ["parameters", *(f"{name}, s" for name in list(found[0])[1:])]
    reporting.show(made, Part("By the number of parameters, of 4×4 and 4 weights", headings, rows, found))


def measure(parameters: int) -> dict[str, float]:
    """The number of Bayesian parameters, and the seconds that each thing takes."""
    model, x, seconds = network(parameters), torch.ones(1, 4), {}

    def timed(name: str, call: Callable[[], object]) -> object:
        start = time.perf_counter()
        result = call()
        seconds[name] = time.perf_counter() - start
        return result

    bnn = timed("convert", partial(bnnify.convert, model))
    assert isinstance(bnn, bnnify.BayesianModel)
    names = {entry.name: bnnify.Gaussian() for entry in bnn.report.bayesian}
    layers = [f"{block}.*" for block in range(len(model))]
    timed("by names and globs", partial(bnnify.convert, model, select=layers, prior=names))
    timed("report", partial(str, bnn.report))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.bnn.pt"
        timed("save", partial(bnnify.save, bnn, path))
        timed("load", partial(bnnify.load, path, model))
    timed("collapse", partial(bnnify.collapse, bnn))
    timed("forward", partial(bnn, x))
    timed(f"predict, K = {SAMPLES}", partial(bnn.predict, x, SAMPLES))
    return {"parameters": len(names), **seconds}


def _options() -> argparse.Namespace:
    parser = reporting.parser(__doc__)
    parser.add_argument("--parameters", nargs="+", type=int, default=list(PARAMETERS), help="how many, at least")
    return parser.parse_args()


if __name__ == "__main__":
    main()
