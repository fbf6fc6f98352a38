"""Trains a deeper ResNet on CIFAR-10 for `cifar10_methods --checkpoint`; a stopped run goes on.

It begins with random weights or as the network of a checkpoint with more blocks, which is trained in a few epochs.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from ..harness import report
from ..harness.data import Images, cifar10
from ..harness.evaluation import evaluate, logits
from ..harness.fine_tuning import BATCH_SIZE, bfloat16
from ..harness.fit import fit, shuffled
from ..harness.networks.cifar_resnet import ResNet, deepened, inputs, pretrained

# As the published ResNet-20 was trained: no blur and no noise, which the fine-tuning of `cifar10_methods` adds.
AUGMENTATION = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()])


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    train, test = cifar10(True, options.data), cifar10(False, options.data)
    network = train_epochs(train, options)
    # Of the training images the first thousand, as of the test images.
    for name, images in {"training": train.take(slice(1000)), "test": test.take(slice(1000))}.items():
        found = evaluate(logits(network, inputs(images.pixels)).softmax(1), images.labels)
        print(f"{name}: accuracy {found.accuracy:.1%}, NLL {found.nll:.3f}, ECE {found.ece:.3f}")
    print(report.versions(["torch", "torchvision"]), report.machine())
    print(f"{time.process_time() / 60:.1f} minutes of a processor, for what was not trained before")


def train_epochs(train: Images, options: argparse.Namespace) -> nn.Module:
    """SGD with a one-cycle learning rate; writes weights and state after each epoch, and goes on from there."""
    torch.manual_seed(0)
    network = ResNet(options.blocks)
    if options.start:
        network = deepened(pretrained(checkpoint=options.start), options.blocks)
    network = network.to(memory_format=torch.channels_last)
    steps = len(train.labels) // BATCH_SIZE
    optimizer = torch.optim.SGD(network.parameters(), lr=options.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=options.epochs * steps)
    done = 0
    if options.checkpoint.exists():
        saved = torch.load(options.checkpoint, weights_only=True)
        for name, each in _parts(network, optimizer, schedule).items():
            each.load_state_dict(saved[name])
        done = saved["epochs"]
    for epoch in range(done, options.epochs):
        torch.manual_seed(epoch)  # so that a run that goes on sees the batches of one that was not stopped
        fit(
            network,
            optimizer,
            train,
            shuffled(len(train.labels), BATCH_SIZE, steps),
            _cross_entropy,
            prepare=_augmented,
            schedule=schedule,
            steps=steps,
            description=f"epoch {epoch + 1} of {options.epochs}",
        )
        state = {name: each.state_dict() for name, each in _parts(network, optimizer, schedule).items()}
        unfinished = options.checkpoint.with_suffix(".part")
        torch.save(state | {"epochs": epoch + 1}, unfinished)
        unfinished.replace(options.checkpoint)
    return network


def _parts(network: nn.Module, optimizer: Any, schedule: Any) -> dict[str, Any]:
    """What a checkpoint holds, the weights under the key that published checkpoints have."""
    return {"state_dict": network, "optimizer": optimizer, "schedule": schedule}


def _cross_entropy(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with bfloat16():
        return F.cross_entropy(network(images), labels)


def _augmented(pixels: Tensor) -> Tensor:
    return inputs(torch.stack([AUGMENTATION(image) for image in pixels]))


def _options() -> argparse.Namespace:
    parser = report.parser(__doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, help="the file to be written")
    add("--data", type=Path, help="folder as in benchmarks/README.md")
    add("--start", type=Path, help="a checkpoint of a network with fewer blocks. Default: random weights")
    add("--blocks", type=int, default=5, help="blocks in each of the three stages; a ResNet-32 has five")
    add("--epochs", type=int, default=12, help="length of the training")
    add("--lr", type=float, default=0.2, help="largest learning rate")
    return parser.parse_args()


if __name__ == "__main__":
    main()
