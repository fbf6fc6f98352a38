"""The networks whose speed is measured, each with a batch of random data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor, nn

from .cifar_resnet import ResNet
from .small_networks import mlp


@dataclass(frozen=True)
class Workload:
    """A network and the shape of what it is trained on."""

    description: str
    build: Callable[[], nn.Module]
    batch: int
    input_shape: tuple[int, ...]
    classes: int = 10

    def inputs(self, device: str, batch: int | None = None) -> Tensor:
        return torch.randn(batch or self.batch, *self.input_shape, device=device)

    def labels(self, device: str, batch: int | None = None) -> Tensor:
        return torch.randint(self.classes, (batch or self.batch,), device=device)


class SequenceClassifier(nn.Module):
    """A transformer encoder and a linear layer on the mean of its tokens; the noise is that of the weights alone."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(256, nhead=8, dim_feedforward=1024, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=4)
        self.head = nn.Linear(256, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(tokens).mean(1))


WORKLOADS = {
    "W1": Workload("MLP 784-1200-1200-10, batch 128", lambda: mlp(1200, depth=2), 128, (784,)),
    "W2": Workload("ResNet-20 at 32×32, batch 128", lambda: ResNet(blocks=3), 128, (3, 32, 32)),
    "W3": Workload("ResNet-18 at 64×64, batch 16", torchvision.models.resnet18, 16, (3, 64, 64), 1000),
    "W4": Workload("TransformerEncoder d=256, 4 layers, 64 tokens, batch 16", SequenceClassifier, 16, (64, 256)),
    "W5": Workload("ResNet-50 at 224×224, batch 256", torchvision.models.resnet50, 256, (3, 224, 224), 1000),
}
ON_CPU = ("W1", "W2", "W3", "W4")
"""W5 is for a GPU."""
