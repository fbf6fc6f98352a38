"""Times tune_std, with labels and without, against one prediction from as many networks over the same data."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

import bnnify

from ..harness import comparison
from ..harness.comparison import Calls
from ..harness.interleaved import interleaved, summary
from ..harness.networks.cifar_resnet import ResNet

NETWORKS: dict[str, tuple[str, Callable[[], Any], int, int, int]] = {
    "resnet20": ("ResNet-20", lambda: ResNet(blocks=3), 100, 32, 10),
    "resnet18": ("torchvision's resnet18", resnet18, 8, 224, 1000),
}
"""What the table calls a network, how to build it, how many images it gets, their width and height, and the classes."""


def main() -> None:
    options = _options()
    run = comparison.begin(options)
    results: dict[str, Any] = {}
    passes: list[str] = []
    for key in options.networks:
        title, build, images, size, classes = NETWORKS[key]
        images, size = options.images or images, options.size or size
        inputs = TensorDataset(torch.randn(images, 3, size, size), torch.randint(classes, (images,)))
        description = f"{title}, {classes:,} classes, {images} images of {size}×{size}"
        network = build().eval().to(options.device)
        calls = _calls(network, DataLoader(inputs, options.batch), options.samples, tried := {})
        calls["predict"]()  # instead of a whole round to warm up, which takes long
        measured = interleaved(calls, options.rounds, options.device, warmup=0, at_least=0.0, description=key)
        results[description] = summary(measured, ["predict"])
        passes.append(f"{description}: " + ", ".join(f"{name} tried {count} factors" for name, count in tried.items()))
        run.record(results)
    notes = [f"{options.rounds} rounds; {comparison.RATIOS}", *passes]
    run.show(comparison.ratio_table(f"tune_std, K = {options.samples}", results), notes=notes)


def _calls(network: Any, loader: DataLoader[Any], samples: int, tried: dict[str, int]) -> Calls:
    """What is timed; how many factors each of them tried is left in ``tried``."""
    bnn = bnnify.convert(network)

    def tune(name: str, **settings: Any) -> None:
        found = bnnify.tune_std(bnn, loader, num_samples=samples, likelihood="logits", **settings)
        tried[name] = len(found.tried)

    return {
        "predict": lambda: bnn.predict(loader, samples, likelihood="logits"),
        "tune_std": lambda: tune("tune_std"),
        "tune_std, labels=False": lambda: tune("tune_std, labels=False", labels=False),
    }


def _options() -> argparse.Namespace:
    parser = comparison.parser(__doc__)
    parser.set_defaults(rounds=2)
    add = parser.add_argument
    add("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS), help="what to measure")
    add("--images", type=int, default=0, help="images of each network; 0 for 100 small ones and 8 large ones")
    add("--size", type=int, default=0, help="width and height of the images; 0 for 32 and 224")
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add("--batch", type=int, default=50, help="images in a batch")
    add("--samples", type=int, default=8, help="K, the number of networks")
    return parser.parse_args()


if __name__ == "__main__":
    main()
