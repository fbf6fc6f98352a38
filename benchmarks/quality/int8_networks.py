"""Exports K networks in floats and in int8, and compares the ONNX files: size, latency, quality, and uncertainty.

The figures are those of the files in onnxruntime, on data that the networks had not seen.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
import torch
import torchvision
from torch import Tensor

import bnnify

from ..harness import report
from ..harness.evaluation import calibration_error
from ..harness.interleaved import interleaved, ratios
from ..harness.networks.subjects import Subject, subjects
from ..harness.report import Run, Table, digits

DEFAULT = ["published ResNet-20, CIFAR-10", "transformer, Fashion"]
UNTRAINED = "resnet18, random weights"
VARIANTS = {"float": None, "int8": False, "int8, weights only": True}
"""Whether weights alone are rounded; None: nothing is."""


@dataclass
class Result:
    """One file. Without labels ``accuracy``, ``nll`` and ``ece`` are None."""

    network: str
    samples: int
    variant: str
    nbytes: int
    ms: float
    relative: float
    """The time of a call, as a multiple of that of the file in floats in the same turn."""
    correlation: float | None
    """That of the mutual information with the one of the file in floats."""
    accuracy: float | None = None
    nll: float | None = None
    ece: float | None = None


def main() -> None:
    options = _options()
    run = Run(options, ["bnnify", "torch", "torchao", "onnx", "onnxruntime", "torchvision", "timm"])
    results = run.collect(_results(options))
    headings = ["network", "K", "", "MB", "ms", "× float", "accuracy", "NLL", "ECE", "correlation of MI"]
    notes = [
        f"ms: a call with a batch of {options.batch}, in turns; correlation: of the mutual information with that of "
        "the floats"
    ]
    run.show(Table("ONNX files in onnxruntime", headings, [_row(each) for each in results], names=3), notes=notes)


def _results(options: argparse.Namespace) -> Iterator[Result]:
    makers = {**subjects(options.data, options.cache, options.images), UNTRAINED: _resnet18}
    for name in options.networks:
        subject = makers[name]()
        std = bnnify.ResponseStd(subject.batches(subject.fitting), options.fraction) if options.fraction else None
        bnn = bnnify.convert(subject.model, **({} if std is None else {"posterior_std": std}))
        for samples in options.samples:
            torch.manual_seed(0)
            yield from _compared(subject, bnnify.freeze(bnn, samples), options)


def _compared(subject: Subject, frozen: Any, options: argparse.Namespace) -> Iterator[Result]:
    inputs, labels = subject.judging
    with tempfile.TemporaryDirectory() as folder:
        calls: dict[str, Callable[[], Any]] = {}
        sizes, found = dict[str, int](), dict[str, tuple[Tensor, Tensor]]()
        for number, variant in enumerate(options.variants):
            path, networks = Path(folder, f"{number}.onnx"), frozen
            if VARIANTS[variant] is not None:
                calibration = subject.batches(subject.fitting)
                networks = bnnify.quantize(frozen, calibration, weights_only=VARIANTS[variant])
            written = bnnify.export(networks, path, inputs[:2].contiguous(), likelihood="logits")
            execute = _session(path, written.inputs[0], options.threads)
            calls[variant], sizes[variant] = partial(execute, inputs[: options.batch]), written.nbytes
            parts = [execute(batch) for batch in inputs.split(subject.batch_size)]
            means, _, informations = (torch.from_numpy(np.concatenate(each)) for each in zip(*parts, strict=True))
            found[variant] = means, informations
        times = interleaved(calls, rounds=options.rounds, warmup=1)
    for variant in options.variants:
        mean, information = found[variant]
        result = Result(
            network=subject.name,
            samples=len(frozen.networks),
            variant=variant,
            nbytes=sizes[variant],
            ms=median(times[variant]),
            relative=ratios(times, variant, "float")[1],
            correlation=_correlation(information, found["float"][1]),
        )
        if subject.name != UNTRAINED:
            mean = mean.double()
            result.accuracy = 100 * (mean.argmax(1) == labels).double().mean().item()
            result.nll = -mean.log().gather(1, labels[:, None]).mean().item()
            result.ece = calibration_error(mean, labels)
        yield result


def _session(path: Path, name: str, threads: int) -> Callable[[Tensor], list[Any]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options)
    return lambda inputs: session.run(None, {name: inputs.contiguous().numpy()})


def _correlation(one: Tensor, other: Tensor) -> float | None:
    """None where all networks agree, as one network does with itself."""
    return torch.corrcoef(torch.stack([one, other]))[0, 1].item() if other.max() > 1e-6 else None


def _resnet18() -> Subject:
    """An architecture of which no trained weights are at hand, with images of noise: for size and latency."""
    torch.manual_seed(0)
    inputs, labels = torch.randn(48, 3, 224, 224), torch.zeros(48, dtype=torch.long)
    model = torchvision.models.resnet18().eval()
    return Subject(UNTRAINED, model, (inputs[:32], labels[:32]), (inputs[32:], labels[32:]), batch_size=16)


def _row(result: Result) -> list[str]:
    quality = (result.accuracy, "1f"), (result.nll, "4f"), (result.ece, "4f"), (result.correlation, "3f")
    return [
        *(result.network, str(result.samples), result.variant, digits(result.nbytes / 1e6), digits(result.ms)),
        f"{result.relative:.2f}",
        *("" if value is None else f"{value:.{places}}" for value, places in quality),
    ]


def _options() -> argparse.Namespace:
    parser = report.parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, help="a folder with the data and checkpoints; else they are downloaded")
    add("--cache", type=Path, help="folder where trained networks are kept and found again")
    add("--networks", nargs="+", default=DEFAULT, metavar="NAME", help=f"as in defaults.py, or {UNTRAINED!r}")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="the first one must be float")
    add("--samples", type=int, nargs="+", default=[1, 5, 10], help="K, the number of networks")
    add("--fraction", type=float, default=0.1, help="of ResponseStd; 0 for the default σ")
    add("--images", type=int, default=1000, help="on which trained networks are judged; the ResNet-20: 500")
    add("--batch", type=int, default=16, help="of the timed calls")
    add("--rounds", type=int, default=9, help="in which the timed calls take turns")
    return parser.parse_args()


if __name__ == "__main__":
    main()
