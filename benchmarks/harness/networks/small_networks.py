"""Small classifiers of many kinds, most of them trained until they are as overconfident as larger ones are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data import Images, cifar10, fashion_mnist, mnist, normalize
from ..fetch import in_folder
from ..fit import fit, shuffled

BATCH_SIZE = 100


def mnist_inputs(images: Images) -> Tensor:
    return normalize(images.pixels, (0.0,), (1.0,))


def cifar10_inputs(images: Images) -> Tensor:
    return normalize(images.pixels, (0.5,) * 3, (0.25,) * 3)


@dataclass(frozen=True)
class Network:
    """A classifier, the data it is for, and how it comes by its weights."""

    name: str
    build: Callable[[], nn.Module]
    data: Callable[[bool, Path | None], Images]
    epochs: int = 0
    lr: float = 1e-3
    num_train: int = 10_000
    """Few images: a network that knows its training set by heart is sure of itself elsewhere too."""
    augment: bool = False
    checkpoint: str = ""
    """A published file under the data folder, instead of training."""
    inputs: Callable[[Images], Tensor] = mnist_inputs
    """Makes of the data what the network takes."""

    def images(self, train: bool, data: Path | None, count: int) -> tuple[Tensor, Tensor]:
        """The first `count` data of either half, as the network wants them, and their labels."""
        if self.data is cifar10 and not train:
            # Only 1,000 test images may lie in a data folder; training uses the first images, so the last are unseen.
            unseen = cifar10(True, data)
            images = unseen.take(slice(len(unseen.labels) - count, None))
        else:
            images = self.data(train, data).take(slice(count))
        return self.inputs(images), images.labels


def trained(network: Network, data: Path | None, cache: Path | None, device: str = "cpu") -> nn.Module:
    """The network in evaluation mode, from its published file, from the cache, or trained now on this device."""
    torch.manual_seed(0)
    model = network.build()
    if network.checkpoint:
        published = torch.load(
            in_folder(data, f"checkpoints/{network.checkpoint}"), map_location="cpu", weights_only=True
        )
        # The keys are the authors' own; the layers stand in the same order.
        model.load_state_dict(dict(zip(model.state_dict(), published.values(), strict=True)))
    else:
        file = cache / f"{network.name.replace(' ', '-')}.pt" if cache else None
        cached(model.to(device), file, lambda: _train(model, network, *network.images(True, data, network.num_train)))
    return model.to(device).eval()


def cached(model: nn.Module, file: Path | None, train: Callable[[], None]) -> None:
    """Loads the weights from the file if there is one; else trains the model and writes them, if a file is named."""
    if file and file.exists():
        model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        return
    train()
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)


def mlp(width: int, depth: int) -> nn.Sequential:
    sizes = [784, *[width] * depth]
    hidden = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))


def lenet5(padding: int = 0) -> nn.Sequential:
    """LeNet-5 with rectifiers: for 32x32 images or, with padding 2 (which keeps their size), for 28x28 ones.

    The former has 61,706 weights; the latter, that of uncertainty-baselines, has 545,546.
    """
    side = 7 if padding else 1
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=padding), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5, padding=padding), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 120, 5, padding=padding), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(120 * side**2, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


def published_lenet5() -> nn.Sequential:
    return nn.Sequential(_MnistAs32x32(), *lenet5())


def robust_cnn() -> nn.Sequential:
    """The architecture of Wong and Kolter (2018), trained to be provably robust, hence calibrated."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 4, 2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, padding=1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(1568, 100), nn.ReLU(), nn.Linear(100, 10)),
    )


def plain_cnn() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 5, 2, padding=2), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, padding=1), nn.ReLU()),
        *(nn.Conv2d(64, 96, 3, 2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1536, 128), nn.ReLU()),
        nn.Linear(128, 10),
    )


def batchnorm_cnn() -> nn.Sequential:
    widths = ((3, 24, 2), (24, 24, 1), (24, 48, 2), (48, 48, 1), (48, 96, 2))
    blocks = [layer for width in widths for layer in _conv_bn(*width)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10))


def mobile_cnn() -> nn.Sequential:
    """Inverted residuals with depthwise convolutions (MobileNetV2), whose filters have nine weights each."""
    blocks = (_InvertedResidual(16, 24), _InvertedResidual(24, 32, stride=2), _InvertedResidual(32, 32))
    return nn.Sequential(*_conv_bn(3, 16, 2), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


class ResidualMLP(nn.Module):
    def __init__(self, width: int = 128, depth: int = 16) -> None:
        super().__init__()
        self.stem = nn.Linear(784, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
            for _ in range(depth)
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(1))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class VisionTransformer(nn.Module):
    """Four encoder layers over patches of 7x7 pixels."""

    def __init__(self, norm_first: bool, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Linear(49, width)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        layer = nn.TransformerEncoderLayer(
            width, nhead=4, dim_feedforward=2 * width, dropout=0.0, batch_first=True, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers=4, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, kernel_size=7, stride=7).mT
        return self.head(self.encoder(self.embed(patches) + self.position).mean(1))


class RowLSTM(nn.Module):
    """Reads an image row by row."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.lstm = nn.LSTM(28, width, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.flatten(1, 2))[0][:, -1])


NETWORKS = (
    Network("MLP 2x400, MNIST", lambda: mlp(400, 2), mnist, epochs=15),
    Network("MLP 2x400, Fashion", lambda: mlp(400, 2), fashion_mnist, epochs=30),
    Network("MLP 8x200, Fashion", lambda: mlp(200, 8), fashion_mnist, epochs=25),
    Network("residual MLP, Fashion", ResidualMLP, fashion_mnist, epochs=12),
    Network("LeNet-5, Fashion", published_lenet5, fashion_mnist, epochs=20),
    Network("LSTM, Fashion", RowLSTM, fashion_mnist, epochs=15, lr=3e-3),
    Network("transformer, Fashion", lambda: VisionTransformer(norm_first=True), fashion_mnist, epochs=20),
    Network("post-norm transformer, MNIST", lambda: VisionTransformer(norm_first=False), mnist, epochs=12, lr=5e-4),
    Network("plain CNN, CIFAR-10", plain_cnn, cifar10, inputs=cifar10_inputs, epochs=25),
    Network("batch-norm CNN, CIFAR-10", batchnorm_cnn, cifar10, inputs=cifar10_inputs, epochs=25, lr=3e-3),
    Network("mobile CNN, CIFAR-10", mobile_cnn, cifar10, inputs=cifar10_inputs, epochs=25, lr=3e-3),
    # Augmented and stopped early: not overconfident, unlike the others that are trained here on CIFAR-10.
    Network(
        "calibrated CNN, CIFAR-10",
        batchnorm_cnn,
        cifar10,
        inputs=cifar10_inputs,
        epochs=15,
        lr=3e-3,
        num_train=15_000,
        augment=True,
    ),
    Network("published LeNet-5, MNIST", published_lenet5, mnist, checkpoint="khushbujpatel_lenet5_mnist.pt"),
    Network("published robust CNN, MNIST", robust_cnn, mnist, checkpoint="convadv_mnist.pth"),
)


class _MnistAs32x32(nn.Module):
    """Resizes and standardises, as the published LeNet-5 was trained."""

    def forward(self, x: Tensor) -> Tensor:
        return (F.interpolate(x, size=32, mode="bilinear") - 0.1307) / 0.3081


class _InvertedResidual(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int = 1, expansion: int = 4) -> None:
        super().__init__()
        wide = expansion * in_channels
        self.body = nn.Sequential(
            *_conv_bn(in_channels, wide, kernel_size=1),
            *_conv_bn(wide, wide, stride, groups=wide),
            *(nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels)),
        )
        self.has_shortcut = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.has_shortcut else self.body(x)


def _conv_bn(inputs: int, outputs: int, stride: int = 1, kernel_size: int = 3, groups: int = 1) -> list[nn.Module]:
    padding = kernel_size // 2
    conv = nn.Conv2d(inputs, outputs, kernel_size, stride, padding, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


def _train(model: nn.Module, network: Network, inputs: Tensor, labels: Tensor) -> None:
    """Adam with one cycle of the learning rate, to the end: no early stopping, no weight decay."""
    steps = network.epochs * (len(inputs) // BATCH_SIZE)
    device = next(model.parameters()).device
    inputs, labels = inputs.to(device), labels.to(device)
    optimizer = torch.optim.Adam(model.parameters(), network.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, network.lr, total_steps=steps, pct_start=0.1)
    fit(
        model,
        optimizer,
        (inputs, labels),
        shuffled(len(inputs), BATCH_SIZE, steps),
        prepare=_augmented if network.augment else nn.Identity(),
        schedule=schedule,
        steps=steps,
        description=f"Training {network.name}",
    )


def _augmented(x: Tensor) -> Tensor:
    """Mirrors each image with probability 1/2 and shifts the batch by up to 2 pixels."""
    flip = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
    down, right = torch.randint(5, (2,)).tolist()
    return F.pad(torch.where(flip, x.flip(-1), x), (2, 2, 2, 2))[..., down : down + 32, right : right + 32]
