"""Images of another kind than those a CIFAR-10 network was trained on: corrupted ones, JPEGs and foreign sets."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .data import Images, cifar10_jpeg

CROP = 128
"""Side of the pieces of photographs, which are shrunk to 32 pixels."""


def corrupted(test: Images, severity: int, count: int | None = None) -> Iterator[tuple[str, Images]]:
    """The images under each corruption that the installed version of imagecorruptions can make, by its name.

    Args:
        test: The images.
        severity: From 1 to 5.
        count: How many images each corruption has: the first one the first of them, the next one those that follow, and
            so on, round and round. Default: all.
    """
    import imagecorruptions

    np.random.seed(0)
    impulses = np.random.default_rng(0)
    size = len(test.labels)
    for number, name in enumerate(imagecorruptions.get_corruption_names()):
        part = test if count is None else test.take((torch.arange(count) + number * count) % size)
        try:
            # scikit-image draws impulse noise from a generator that it makes anew, from the entropy of the system.
            with warnings.catch_warnings(), mock.patch("numpy.random.default_rng", return_value=impulses):
                warnings.simplefilter("ignore")
                images = [
                    imagecorruptions.corrupt(np.ascontiguousarray(image), severity=severity, corruption_name=name)
                    for image in part.pixels.permute(0, 2, 3, 1).numpy()
                ]
        except (AttributeError, TypeError) as error:
            print(f"left out {name}: {error}")
            continue
        yield name, Images(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), part.labels)


def jpeg_places(labels: Tensor) -> Tensor:
    """Where the JPEGs of the first test images stand, which have these labels: files are numbered within classes."""
    seen = dict.fromkeys(range(10), 0)
    places = []
    for label in labels.tolist():
        places.append(1000 * label + seen[label])
        seen[label] += 1
    return torch.tensor(places)


def other_jpegs(data: Path, labels: Tensor, count: int) -> Images:
    """At random so many JPEGs of test images, without those of the first ones, which have these labels."""
    jpeg = cifar10_jpeg(data)
    others = torch.ones(len(jpeg.labels), dtype=torch.bool)
    others[jpeg_places(labels)] = False
    places = others.nonzero().flatten()
    return jpeg.take(places[torch.randperm(len(places), generator=torch.Generator().manual_seed(0))[:count]])


def as_cifar(images: Images, count: int) -> Images:
    """Grey images of 28x28 pixels as RGB of 32x32, with a black border."""
    grey = F.pad(images.pixels[:count], (2, 2, 2, 2))
    return Images(grey.expand(-1, 3, -1, -1).contiguous(), images.labels[:count])


def noise(count: int) -> Images:
    """Pixels that are uniform and independent."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.zeros(count, dtype=torch.long))


def photographs(count: int) -> Images:
    """Pieces, at random, of photographs that scikit-learn and scikit-image ship, without things of CIFAR-10 in them.

    A palace, a flower, a cup of coffee, a retina, galaxies and stained tissue.
    """
    import skimage.data
    from sklearn.datasets import load_sample_images

    names = ("coffee", "retina", "hubble_deep_field", "immunohistochemistry")
    whole = [*load_sample_images().images, *(getattr(skimage.data, name)() for name in names)]
    generator = np.random.default_rng(0)
    pieces = []
    for number in range(count):
        image = whole[number % len(whole)]
        top, left = (generator.integers(side - CROP + 1) for side in image.shape[:2])
        pieces.append(image[top : top + CROP, left : left + CROP])
    small = F.avg_pool2d(torch.from_numpy(np.stack(pieces)).permute(0, 3, 1, 2).float(), CROP // 32)
    return Images(small.round().byte(), torch.zeros(count, dtype=torch.long))
