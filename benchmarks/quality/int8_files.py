"""Saves a converted ResNet-20 as it is and in int8, and compares the files and what is predicted from them."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import bnnify

from ..harness import report
from ..harness.data import cifar10
from ..harness.networks.cifar_resnet import inputs, pretrained
from ..harness.report import Run, Table


@dataclass(frozen=True)
class File:
    """One file, and the prediction of the model in it."""

    size: int
    """Its bytes."""
    nll: float
    """Mean negative log likelihood of the labels, in nats."""
    mutual_information: Tensor


def main() -> None:
    options = _options()
    run = Run(options, ("torch", "torchvision"))
    with tempfile.TemporaryDirectory() as folder:
        full, small = compared(options.data, options.images, options.samples, Path(folder))
    correlation = torch.corrcoef(torch.stack([full.mutual_information, small.mutual_information]))[0, 1].item()
    rows = [
        ["as it is", f"{full.size:,}", f"{full.nll:.4f}", "1"],
        ["int8", f"{small.size:,}", f"{small.nll:.4f}", f"{correlation:.4f}"],
    ]
    title = f"ResNet-20 as converted, {options.images} test images of CIFAR-10, the same {options.samples} draws"
    run.show(Table(title, ["file", "bytes", "NLL", "correlation of the mutual information"], rows))


def compared(data: Path | None, images: int, samples: int, folder: Path) -> list[File]:
    """Saves, loads and measures both files, with the same noise."""
    test = cifar10(train=False, data=data).take(slice(images))
    network = pretrained(data)
    bnn = bnnify.convert(network)
    measured = []
    for dtype in (None, "int8"):
        path = folder / f"{dtype}.bnn.pt"
        bnnify.save(bnn, path, dtype=dtype)
        torch.manual_seed(0)
        found = bnnify.load(path, network).predict(list(inputs(test.pixels).split(500)), samples, likelihood="logits")
        nll = F.nll_loss(found.mean.log(), test.labels).item()
        measured.append(File(path.stat().st_size, nll, found.mutual_information))
    return measured


def _options() -> argparse.Namespace:
    parser = report.parser(__doc__)
    parser.add_argument("--data", type=Path, help="a folder with CIFAR-10 and the checkpoint; else they are downloaded")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=16, help="K, the number of networks")
    return parser.parse_args()


if __name__ == "__main__":
    main()
