"""Published architectures for CIFAR-10 and an LSTM for text, trained until they are useful."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import Images, cifar10, sst2
from .small_networks import Network, cifar10_inputs

VOCABULARY = 8_000


class Enlarged(nn.Module):
    """A network for larger images, with what makes them of small ones."""

    def __init__(self, network: nn.Module, size: int) -> None:
        super().__init__()
        self.network, self.size = network, size

    def forward(self, x: Tensor) -> Tensor:
        return self.network(F.interpolate(x, size=self.size, mode="bilinear"))


class WordLSTM(nn.Module):
    """Reads word numbers, shape (N, T), of which zeros at the end are padding, and classifies by the last state."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, 2)

    def forward(self, words: Tensor) -> Tensor:
        states = self.lstm(self.embedding(words))[0]
        last = (words != 0).sum(1).clamp_min(1) - 1
        return self.head(states[torch.arange(len(words), device=words.device), last])


def mobilenet_v3() -> nn.Module:
    return Enlarged(torchvision.models.mobilenet_v3_small(num_classes=10), 64)


def convnext() -> nn.Module:
    return Enlarged(timm.create_model("convnext_atto", num_classes=10), 64)


def vit() -> nn.Module:
    options = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4, "num_classes": 10}
    return timm.models.VisionTransformer(**options)


def sentences(train: bool, data: Path | None) -> Images:
    """The texts of SST-2 as word numbers; the last 5,000 phrases of its training set are kept for the test."""
    words, labels = sst2(data, VOCABULARY, length=40)
    return Images(words, labels).take(slice(-5_000) if train else slice(-5_000, None))


CIFAR = partial(Network, data=cifar10, inputs=cifar10_inputs, augment=True, num_train=20_000)
LARGER_NETWORKS = (
    CIFAR("MobileNetV3, CIFAR-10", mobilenet_v3, epochs=30, lr=3e-3),
    CIFAR("ConvNeXt, CIFAR-10", convnext, epochs=25, lr=1e-3),
    CIFAR("ViT, CIFAR-10", vit, epochs=40, lr=1e-3),
    Network("LSTM, SST-2", WordLSTM, sentences, epochs=4, num_train=40_000, inputs=lambda images: images.pixels),
)
