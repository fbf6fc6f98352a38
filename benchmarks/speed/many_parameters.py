"""How long models with many parameters take to convert, save, load, report and run: it should grow as their number."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import bnnify

from ..harness import report
from ..harness.report import Run, Table, digits

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
    run = Run(options, ["torch"])
    found = run.collect(map(measure, options.parameters))
    rows = [[f"{row['parameters']:,}", *(digits(seconds) for seconds in list(row.values())[1:])] for row in found]
    headings = ["parameters", *(f"{name}, s" for name in list(found[0])[1:])]
    run.show(Table("By the number of parameters, of 4×4 and 4 weights", headings, rows))


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
    parser = report.parser(__doc__)
    parser.set_defaults(threads=2)
    parser.add_argument("--parameters", nargs="+", type=int, default=list(PARAMETERS), help="how many, at least")
    return parser.parse_args()


if __name__ == "__main__":
    main()
