"""Move a batch to the device of a model, with all that is nested in it."""

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
    """List the devices of a model's parameters and buffers, the first parameter's first, without the meta device."""
    tensors = chain(module.parameters(), module.buffers())
    return [tensor.device for tensor in tensors if tensor.device.type != "meta"]


def placed(batch: Any, devices: list[torch.device]) -> Any:
    """Move ``batch`` to the first of the model's ``devices``, unless a tensor of it is on an accelerator among these.

    A prefetching loader, or the owner of a model on several devices, may have put it there on purpose.
    """
    if not devices:
        return batch
    accelerators = set(devices) - {torch.device("cpu")}
    if any(tensor.device in accelerators for tensor in tensors_in(batch)):
        return batch
    return _moved(batch, devices[0])


def _moved(value: Any, device: torch.device) -> Any:
    """Copy nested containers and dataclasses with everything that has a method ``to`` on ``device``."""

    def moved(leaf: Any) -> Any:
        if hasattr(leaf, "to"):
            return leaf.to(device)
        if not dataclasses.is_dataclass(leaf) or isinstance(leaf, type):
            return leaf
        clone = copy.copy(leaf)
        for field in dataclasses.fields(leaf):
            object.__setattr__(clone, field.name, _moved(getattr(leaf, field.name), device))  # it may be frozen
        return clone

    return tree_map(moved, value)
