"""Values of a pickle, once it is known that they are of the type, and of the size, that torch.save writes."""

__all__ = ["as_key", "as_size", "of_type"]

from typing import Any

import torch

from .archive import Refusal
from .records import Instance, Name


def of_type(value: Any, *types: type) -> Any:
    if type(value) not in types:
        raise Refusal(f"it has a {type(value).__name__} where torch.save writes something else. Get the file again.")
    return value


def as_size(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 60:
        raise Refusal("it has a number that can be no size: it is damaged. Get the file again.")
    return value


def as_key(value: Any) -> Any:
    """Return ``value``, once it is known that hashing it is quick, cannot recurse and cannot be made to collide."""
    if type(value) is tuple and len(value) <= 16 and tuple not in map(type, value):
        return tuple(map(as_key, value))
    if type(value) is int and abs(value) < 1 << 60:
        return value
    if value is None or type(value) in (str, bytes, float, bool, torch.dtype, torch.device, Instance, Name):
        return value
    raise Refusal(f"it has a {type(value).__name__} as the key of a mapping. Save the state_dict alone.")
