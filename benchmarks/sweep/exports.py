"""Export networks of the architectures of torchvision, timm and transformers as ONNX, and run them in two runtimes.

`bnnify.export` compares each file with the networks in onnxruntime; where OpenVINO is installed, it reads the same file
and is compared as well. Weights are random, and inputs are small.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

import bnnify
from bnnify.deployment.formats import FORMATS
from bnnify.model import stacked
from bnnify.torch_internals import tree_leaves

from ..harness import report
from ..harness.interleaved import interleaved
from ..harness.report import Table, digits
from . import families

SPREAD = {
    "torchvision": """
        alexnet convnext_tiny deeplabv3_mobilenet_v3_large densenet121 efficientnet_b0 fasterrcnn_mobilenet_v3_large_fpn
        googlenet inception_v3 maxvit_t mnasnet0_5 mobilenet_v2 mobilenet_v3_small r3d_18 raft_small regnet_y_400mf
        resnet18 resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_1 swin_t vgg11 vit_b_32 wide_resnet50_2
    """,
    "timm": "efficientvit_m0 mobilevit_xxs pit_ti_224 test_convnext",
    "transformers": "albert bert gpt2 llama t5 whisper",
}
"""Of torchvision one of each family, of the others some types."""


@dataclass
class Result:
    """One network; times are in milliseconds, and ``error`` says why there is no file."""

    family: str
    name: str
    seconds: float = 0.0
    nbytes: int = 0
    least: int = 0
    difference: float = 0.0
    dynamic: bool = False
    ms: float = 0.0
    loop_ms: float = 0.0
    openvino: str = ""
    error: str = ""


def main() -> None:
    options = _options()
    libraries = ["bnnify", "torch", "onnx", "onnxruntime", "openvino", "torchvision", "timm", "transformers"]
    run = report.Run(options, libraries)
    results = run.collect(_results(options))
    headings = ["library", "network", "any batch", "export, s", "MB", "× least", "onnxruntime", "OpenVINO"]
    headings += ["ms", "× the K networks"]
    notes = [
        f"K = {options.samples} networks, float32. Least: the deterministic weights once, the Bayesian ones K times. "
        "Under the runtimes: the largest difference from the networks in torch, relative to their largest output. "
        "ms: a call in onnxruntime"
    ]
    notes += [f"{result.name}: {result.error}" for result in results if result.error]
    rows = [_row(result) for result in results if not result.error]
    run.show(Table("Networks exported as ONNX", headings, rows, names=2), notes=notes)


def _results(options: argparse.Namespace) -> Iterator[Result]:
    for family, names in SPREAD.items():
        if family in options.families:
            cases = families.cases(family)
            for name in names.split():
                if name in (options.only or [name]):
                    yield _result(family, name, cases[name], options)
                    gc.collect()


def _result(family: str, name: str, case: Any, options: argparse.Namespace) -> Result:
    torch.manual_seed(0)
    model = case.build().eval()
    args, kwargs = case.inputs(model)
    frozen = bnnify.freeze(bnnify.convert(model, inplace=True), options.samples)
    tensors = {id(tensor): tensor for tensor in (*frozen.parameters(), *frozen.buffers())}
    result = Result(family, name, least=sum(tensor.nbytes for tensor in tensors.values()))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder, "model.onnx")
        started = time.perf_counter()
        try:
            both = bool(args and kwargs)
            example = inspect.signature(model.forward).bind(*args, **kwargs).arguments if both else kwargs or args
            written = bnnify.export(frozen, path, example, output=first_tensor, outputs=["networks"])
        except bnnify.BnnifyError as error:
            result.error = str(error)
            return result
        result.seconds = time.perf_counter() - started
        result.nbytes = written.nbytes
        result.dynamic = any(0 in dimensions for dimensions in written.dynamic.values())
        execute = FORMATS["onnx"].load(path, written.outputs)
        calls: dict[str, Callable[[], Any]] = {
            "file": lambda: execute((args, kwargs)),
            "loop": lambda: [network(*args, **kwargs) for network in frozen.networks],
        }
        times = interleaved(calls, rounds=options.rounds, warmup=1)
        result.ms, result.loop_ms = median(times["file"]), median(times["loop"])
        expected = stacked([first_tensor(output) for output in calls["loop"]()])
        result.difference = written.max_difference / expected.abs().max().item()
        with suppress(ImportError):
            result.openvino = _in_openvino(path, [*tree_leaves((args, kwargs))], expected)
    return result


def _in_openvino(path: Path, inputs: list[Any], expected: Tensor) -> str:
    """The largest relative difference of what OpenVINO computes in float32, or what it says instead."""
    import openvino

    core = openvino.Core()
    try:
        compiled = core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        found = compiled([each.numpy() for each in inputs if isinstance(each, Tensor)])
    except RuntimeError as error:
        return str(error).strip().splitlines()[-1][:80]
    return f"{np.abs(next(iter(found.values())) - expected.numpy()).max() / expected.abs().max().item():.0e}"


def first_tensor(found: Any) -> Tensor:
    """Choose the first tensor of an output, whatever it is nested in."""
    return next(leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor))


def _row(result: Result) -> list[str]:
    return [
        *(result.family, result.name, "yes" if result.dynamic else "no"),
        *(digits(result.seconds), digits(result.nbytes / 1e6), f"{result.nbytes / result.least:.2f}"),
        *(f"{result.difference:.0e}", result.openvino),
        *(digits(result.ms), f"{result.ms / result.loop_ms:.2f}"),
    ]


def _options() -> argparse.Namespace:
    parser = report.parser(__doc__)
    parser.add_argument("--families", nargs="+", choices=SPREAD, default=list(SPREAD))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these networks")
    parser.add_argument("--samples", type=int, default=2, help="K, the number of networks")
    parser.add_argument("--rounds", type=int, default=5, help="in which the timed calls take turns")
    return parser.parse_args()


if __name__ == "__main__":
    main()
