"""Image data sets as plain tensors, from a folder of archives where one is given, else downloaded by torchvision."""

from __future__ import annotations

import collections
import gzip
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor

from .fetch import fetched, in_folder

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Images(NamedTuple):
    """Images as bytes, shape (N, C, H, W), with their labels, shape (N,)."""

    pixels: Tensor
    labels: Tensor

    def take(self, index: slice | Tensor) -> Images:
        return Images(self.pixels[index], self.labels[index])

    def evenly(self, count: int) -> Images:
        """At most so many of them, evenly spread: a set that is sorted by class keeps all classes."""
        step = max(1, len(self.labels) // count)
        return self.take(slice(0, count * step, step))


def cifar10(train: bool, data: Path | None = None) -> Images:
    """CIFAR-10 without loss; a data folder holds only the first 1,000 of the 10,000 test images."""
    if data is None:
        downloaded = fetched("CIFAR-10", lambda: torchvision.datasets.CIFAR10(_cache(), train, download=True))
        return _channels_first(downloaded.data, downloaded.targets)
    parts = ["train_lossless_a", "train_lossless_b"] if train else ["test_lossless_1000"]
    archives = [_mosaics(in_folder(data, f"cifar10_{part}.zip")) for part in parts]
    return _channels_first(*map(np.concatenate, zip(*archives, strict=True)))


def cifar10_jpeg(data: Path) -> Images:
    """The 10,000 CIFAR-10 test images after strong JPEG compression: a shift of the distribution."""
    with zipfile.ZipFile(in_folder(data, "cifar10_test_jpeg.zip")) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        pixels = [_image(archive.read(name)) for name in names]
    labels = [CIFAR10_CLASSES.index(Path(name).parent.name) for name in names]
    return _channels_first(np.stack(pixels), labels)


def mnist(train: bool, data: Path | None = None) -> Images:
    """The handwritten digits."""
    return _mnist_like(torchvision.datasets.MNIST, train, data)


def fashion_mnist(train: bool, data: Path | None = None) -> Images:
    """The clothes of Zalando: MNIST's format, and out of its distribution."""
    return _mnist_like(torchvision.datasets.FashionMNIST, train, data)


def sst2(data: Path, vocabulary: int, length: int) -> tuple[Tensor, Tensor]:
    """The training phrases of SST-2, in a fixed random order, as numbers of words, shape (N, length), and their labels.

    The commonest words have numbers from 2 on, by how common they are, all others have 1, and 0 is padding.
    """
    with zipfile.ZipFile(in_folder(data, "sst2.zip")) as archive:
        lines = archive.read("train.tsv").decode().splitlines()[1:]
    texts, labels = zip(*(line.rsplit("\t", 1) for line in lines), strict=True)
    words = [text.split()[:length] for text in texts]
    common = collections.Counter(word for text in words for word in text).most_common(vocabulary - 2)
    numbers = {word: number for number, (word, _) in enumerate(common, 2)}
    padded = [[numbers.get(word, 1) for word in text] + [0] * (length - len(text)) for text in words]
    order = torch.randperm(len(padded), generator=torch.Generator().manual_seed(0))
    return torch.tensor(padded)[order], torch.tensor([int(label) for label in labels])[order]


def normalize(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Bytes to floats, standardised per channel."""
    mean, std = (torch.tensor(values, device=pixels.device).view(-1, 1, 1) for values in (mean, std))
    return (pixels.float() / 255 - mean) / std


def _mosaics(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of an archive of mosaics, each of 25 rows and 40 columns of tiles."""
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".webp"))
        tiles = [_image(archive.read(name)).reshape(25, 32, 40, 32, 3).swapaxes(1, 2) for name in names]
        labels = np.load(io.BytesIO(archive.read("labels.npy")))
    return np.concatenate(tiles).reshape(-1, 32, 32, 3), labels


def _image(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def _mnist_like(kind: type[torchvision.datasets.MNIST], train: bool, data: Path | None) -> Images:
    if data is None:
        downloaded = fetched(kind.__name__, lambda: kind(str(_cache()), train, download=True))
        return Images(downloaded.data.unsqueeze(1), downloaded.targets)
    # Read where they lie: torchvision would unpack them beside the archives, in a folder that may be read-only.
    prefix = f"{kind.__name__}/raw/{'train' if train else 't10k'}"
    pixels = _idx(in_folder(data, f"{prefix}-images-idx3-ubyte.gz"), header=16)
    labels = _idx(in_folder(data, f"{prefix}-labels-idx1-ubyte.gz"), header=8)
    return Images(pixels.view(-1, 1, 28, 28), labels.long())


def _idx(path: Path, header: int) -> Tensor:
    return torch.tensor(np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header))


def _channels_first(pixels: np.ndarray, labels: Sequence[int] | np.ndarray) -> Images:
    return Images(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.as_tensor(labels).long())


def _cache() -> Path:
    return Path(torch.hub.get_dir()) / "datasets"
