"""Every builder of torchvision, with random weights."""

__all__ = ["cases"]

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import detection, get_model, list_models, optical_flow, segmentation, video

from tests.contract import Case, Inputs

# Where 64 pixels are too few, or where the size is part of the architecture.
_SIZES = {"inception_v3": 96, "maxvit_t": 224}


def cases() -> Iterator[Case]:
    """The builders of ``torchvision.models.list_models()``; a quantized one also as its float model."""
    for name in list_models():
        if name.startswith("quantized_"):
            yield Case(name, lambda name=name: get_model(name, quantize=True), _images, refuses=True)
            yield _classifier(f"{name}(quantize=False)", name, quantize=False)
        elif name in list_models(detection):
            yield _detector(name)
        elif name in list_models(segmentation):
            yield Case(name, lambda name=name: get_model(name, weights_backbone=None), _images)
        elif name in list_models(video):
            yield Case(name, lambda name=name: get_model(name), lambda model, name=name: _video(name))
        elif name in list_models(optical_flow):
            yield Case(name, lambda name=name: get_model(name), _frames)
        else:
            yield _classifier(name, name)


def _classifier(title: str, name: str, **options: Any) -> Case:
    plain = name.removeprefix("quantized_")
    size = _SIZES.get(plain, 64)
    auxiliary = plain == "inception_v3"  # its auxiliary head, which only exists in train, takes no smaller image
    if plain in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    if plain.startswith("vit_"):
        size = options["image_size"] = 2 * int(plain.rpartition("_")[2])
    return Case(
        title,
        lambda: get_model(name, **options),
        lambda model: _images(model, size),
        lambda model: _images(model, 299 if auxiliary else size),
    )


def _detector(name: str) -> Case:
    # Random scores are about 1/91, and a threshold above them would leave nothing of the output to compare.
    two_stages = "rcnn" in name
    options: dict[str, Any] = {"box_score_thresh" if two_stages else "score_thresh": 0.0, "weights_backbone": None}
    if not name.startswith("ssd"):
        options |= {"min_size": 64, "max_size": 96}

    def targets() -> list[dict[str, Tensor]]:
        target = {
            "boxes": torch.tensor([[8.0, 8.0, 40.0, 48.0], [20.0, 4.0, 60.0, 30.0]]),
            "labels": torch.tensor([1, 1]),
        }
        if name.startswith("maskrcnn"):
            target["masks"] = torch.zeros(2, 64, 64, dtype=torch.uint8)
            target["masks"][:, 8:30, 20:40] = 1
        if name.startswith("keypointrcnn"):
            target["keypoints"] = torch.tensor([25.0, 20.0, 1.0]).expand(2, 17, 3)
        return [target, target]

    return Case(
        name,
        lambda: get_model(name, **options),
        lambda model: (([torch.rand(3, 64, 64)],), {}),
        lambda model: (([torch.rand(3, 64, 64), torch.rand(3, 64, 64)], targets()), {}),
    )


def _images(model: nn.Module, size: int = 64) -> Inputs:
    return (torch.randn(2, 3, size, size),), {}


def _video(name: str) -> Inputs:
    frames, size = {"s3d": (16, 224), "mvit_v1_b": (16, 224), "mvit_v2_s": (16, 224)}.get(name, (4, 32))
    return (torch.randn(2 if size == 32 else 1, 3, frames, size, size),), {}


def _frames(model: nn.Module) -> Inputs:
    return tuple(torch.rand(1, 3, 128, 128) for _ in range(2)), {"num_flow_updates": 2}
