"""The families of models over which the sweep goes: one file each, which lists its models without building them."""

__all__ = ["FAMILIES", "Inputs", "Specimen", "specimens"]

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

FAMILIES = ("torchvision", "timm", "transformers")

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Specimen:
    """A model of the sweep and inputs for it.

    Attributes:
        name: As its library calls it.
        build: Makes the model with random weights; called under a fixed seed.
        inputs: Makes ``(args, kwargs)`` of one forward in eval, given the model; called under a fixed seed, small.
        train_inputs: The same for one forward in train, where that takes others (a detector's targets). Default:
            ``inputs``.
        refuses: Whether ``convert`` must raise a ConversionError. Default: ``False``.
        settings: Further keyword arguments of ``convert``, such as ``select``. Default: none.
        trains: Whether the model's own forward works in train. Default: ``True``.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[nn.Module], Inputs]
    train_inputs: Callable[[nn.Module], Inputs] | None = None
    refuses: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    trains: bool = True


def specimens(family: str) -> dict[str, Specimen]:
    """The models of a family by name, none of them built; ``families/<family>_models.py`` has ``specimens()``.

    Raises:
        ImportError: The library is not installed.
    """
    listed = importlib.import_module(f".{family}_models", __name__).specimens()
    return {specimen.name: specimen for specimen in listed}
