"""How far two computations of the same numbers are apart, and how far rounding may take them."""

__all__ = ["largest_difference", "rounding"]

from collections.abc import Iterable

import torch
from torch import Tensor


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference between the elements; NaN and infinity agree with themselves alone."""
    exact = torch.promote_types(expected.dtype, torch.float64)
    found, expected = found.to(expected.device, exact), expected.to(exact)
    same = (found == expected) | (found.isnan() & expected.isnan())
    apart = (found - expected).abs().nan_to_num(nan=torch.inf).masked_fill(same, 0.0)
    return apart.max().item() if apart.numel() else 0.0


def rounding(tensors: Iterable[Tensor]) -> float:
    """The difference that rounding explains: half of the digits of the largest number."""
    finite = [tensor[tensor.isfinite()].abs() for tensor in tensors if tensor.is_floating_point()]
    return max((torch.finfo(each.dtype).eps ** 0.5 * each.max().item() for each in finite if len(each)), default=0.0)
