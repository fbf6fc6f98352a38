"""What is done to an image before a network sees it: the preset of the architecture, or what the user says."""

__all__ = ["Preprocessing", "preprocessing_of"]

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ArgumentError


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop the middle, scale to 0 to 1, and normalise.

    Attributes:
        resize: The shorter side before the crop, in pixels; None leaves images as large as they are.
        size: The height and width of the crop.
        mean: What is subtracted from each channel.
        std: What each channel is divided by afterwards.
        interpolation: The name of torchvision's mode.
    """

    resize: int | None
    size: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"

    def __call__(self, image: Any) -> Tensor:
        from torchvision.transforms import InterpolationMode, functional

        if image.mode.startswith("I;16"):
            image = image.point(lambda value: value / 256, "L")  # convert would cut off what is above 255
        elif image.mode in ("I", "F"):
            raise ArgumentError(
                f"nothing tells the range of its pixels, of kind {image.mode}; save it with 8 or 16 bits"
            )
        image = image.convert("RGB" if len(self.mean) == 3 else "L")
        if self.resize is not None and self.size is not None:
            image = functional.resize(image, [self.resize], InterpolationMode(self.interpolation))
            image = functional.center_crop(image, list(self.size))
        tensor = functional.convert_image_dtype(functional.pil_to_tensor(image), torch.float)
        return functional.normalize(tensor, list(self.mean), list(self.std))

    def __str__(self) -> str:
        size = (
            "as large as they are"
            if self.size is None
            else f"resized to {self.resize}, of which the middle {self.size[0]}×{self.size[1]}"
        )
        mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        return f"{size}; mean {mean}; std {std}"

    def as_data(self) -> dict[str, Any]:
        """Return plain data, for the history."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    @staticmethod
    def from_data(data: Mapping[str, Any]) -> "Preprocessing":
        """Make what gave ``data``."""
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
        return Preprocessing(**dict[str, Any](values))


_IMAGENET = Preprocessing(256, (224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_NEUTRAL = Preprocessing(None, None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
"""For a network of which nobody knows anything."""


def preprocessing_of(
    module: nn.Module,
    recipe: Any,
    known: Mapping[str, Any] | None = None,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Preprocessing:
    """Return the preset of the network's architecture, with what is said otherwise.

    Args:
        module: The network.
        recipe: Its :class:`~bnnify.checkpoints.architectures.recipe.Recipe`; None if the architecture is not known.
        known: What an earlier command used, which goes before the preset. Default: ``None``.
        size: The side of the crop; the shorter side before it grows or shrinks along. Default: ``None``, the preset's.
        mean: As above. Default: ``None``, the preset's.
        std: As above. Default: ``None``, the preset's.

    Raises:
        ArgumentError: ``mean`` or ``std`` has another number of channels than the network.
    """
    if known is not None:
        found = Preprocessing.from_data(known)
    elif recipe is None:
        found = _NEUTRAL
    else:
        found = _of_timm(module) if recipe.library == "timm" else _of_torchvision(recipe)
    if size is not None:
        before = found.resize / found.size[0] if found.resize and found.size else 1
        found = dataclasses.replace(found, size=(size, size), resize=round(size * before))
    channels = _channels(module)
    if channels != len(found.mean):  # a grey image is as bright as its channels on average
        means = [sum(values) / len(values) for values in (found.mean, found.std)]
        found = dataclasses.replace(found, mean=(means[0],) * channels, std=(means[1],) * channels)
    for name, values in {"mean": mean, "std": std}.items():
        if values is not None:
            if len(values) not in (1, channels):
                raise ArgumentError(f"--{name} takes a number for each of {channels} channels, or one for all.")
            changed: dict[str, Any] = {name: tuple(values) * (channels if len(values) == 1 else 1)}
            found = dataclasses.replace(found, **changed)
    return found


def _of_torchvision(recipe: Any) -> Preprocessing:
    """The transforms of the default weights, at the size that the recipe asks for."""
    from torchvision import models

    weights = models.get_model_weights(recipe.builder)
    default = getattr(weights, "DEFAULT", None)
    preset = None if default is None else default.transforms()
    found = _IMAGENET
    if preset is not None and hasattr(preset, "crop_size"):
        crop, resize = preset.crop_size[0], preset.resize_size[0]
        found = Preprocessing(resize, (crop, crop), tuple(preset.mean), tuple(preset.std), preset.interpolation.value)
    size = recipe.arguments.get("image_size")
    return found if size is None else dataclasses.replace(found, resize=size, size=(size, size))


def _of_timm(module: nn.Module) -> Preprocessing:
    from timm.data.config import resolve_data_config

    config = resolve_data_config({}, model=module)
    height, width = config["input_size"][-2:]
    resize = math.floor(min(height, width) / config["crop_pct"])
    return Preprocessing(resize, (height, width), tuple(config["mean"]), tuple(config["std"]), config["interpolation"])


def _channels(module: nn.Module) -> int:
    """The channels of the images that the first convolution takes: one or three."""
    convolutions = (each for each in module.modules() if isinstance(each, nn.Conv2d))
    first = next(convolutions, None)
    return 1 if first is not None and first.in_channels == 1 else 3
