"""Where a batch goes: to the device of the model, with all that is nested in it."""

__all__ = ["devices_of", "placed"]

import copy
import dataclasses
from itertools import chain
from typing import Any

import torch
from torch import nn

from ..draws.outputs import tensors_in
from ..torch_internals import tree_map


def devices_of(module: nn.Module) -> list[torch.device]:
    """The devices of a model's parameters and buffers, the first parameter's first; none for those without values."""
    tensors = chain(module.parameters(), module.buffers())
    return [tensor.device for tensor in tensors if tensor.device.type != "meta"]


def placed(batch: Any, devices: list[torch.device]) -> Any:
    """Move ``batch`` to the first of the model's ``devices``, unless a tensor of it is on an accelerator among these.

    Whoever has put it there knows best: a prefetching loader, or the owner of a model on several devices.
    """
    if not devices:
        return batch
    accelerators = set(devices) - {torch.device("cpu")}
    if any(tensor.device in accelerators for tensor in tensors_in(batch)):
        return batch
    return _moved(batch, devices[0])


def _moved(value: Any, device: torch.device) -> Any:
    """A copy of nested containers and dataclasses in which everything that has a method ``to`` is on ``device``."""
    return tree_map(lambda leaf: _moved_leaf(leaf, device), value)


def _moved_leaf(leaf: Any, device: torch.device) -> Any:
    if hasattr(leaf, "to"):
        return leaf.to(device)
    if not dataclasses.is_dataclass(leaf) or isinstance(leaf, type):
        return leaf
    clone = copy.copy(leaf)
    for field in dataclasses.fields(leaf):
        object.__setattr__(clone, field.name, _moved(getattr(leaf, field.name), device))  # it may be frozen
    return clone
