"""Checks of outputs that hold logits or probabilities of classes."""

__all__ = ["check_logits", "check_probabilities", "dimension_of_classes"]

import torch
from torch import Tensor

from ..distributions.gaussian import at_least_float32
from ..errors import ArgumentError

_TOLERANCE = 1e-2
"""By how much the sum of probabilities may differ from one: half precision rounds each to three digits."""


def dimension_of_classes(value: Tensor, class_dim: int | None, rows: int | None) -> int:
    """Find the dimension of the classes: ``class_dim``, or the last one where that is sure.

    Raises:
        ArgumentError: There is no such dimension, or ``class_dim`` has to be said; ``rows`` is the number of examples.
    """
    shape = tuple(value.shape)
    if class_dim is None:
        if rows is not None and rows > 1 and shape == (rows,):
            raise ArgumentError(
                f"The output has the shape {shape}, one number for each example, and no dimension of classes. Of a "
                "yes/no question with one logit pass likelihood='binary_logits', of a regression 'values'; if these "
                "are the classes of a single example, class_dim=0."
            )
        if value.ndim > 3:
            raise ArgumentError(
                f"The output has the shape {shape}, and the classes of images are seldom in the last dimension. "
                "Say where they are: class_dim=1 for (N, C, H, W), class_dim=-1 for the last dimension."
            )
        class_dim = -1
    if not -value.ndim <= class_dim < value.ndim:
        raise ArgumentError(f"The output has the shape {shape}, which has no dimension {class_dim} for classes.")
    return class_dim


def check_logits(value: Tensor, dim: int, look: bool) -> None:
    """Raise an ArgumentError where there is one class, or, if ``look``, where the values are probabilities already."""
    shape = tuple(value.shape)
    if value.shape[dim] < 2:
        raise ArgumentError(
            f"likelihood='logits' needs a logit for each class; along dimension {dim} of the output, of shape {shape}, "
            f"there is {value.shape[dim]}, whose probability is always one. Of a yes/no question with one logit pass "
            "likelihood='binary_logits', of a regression 'values'."
        )
    # By chance two rows of logits have no sum that is one to the last digit.
    if look and value.numel() >= 2 * value.shape[dim] and value.dtype in (torch.float32, torch.float64):
        exactly = 8 * torch.finfo(value.dtype).eps
        if ((value >= 0).all() & ((value.sum(dim) - 1).abs() <= exactly).all()).item():
            raise ArgumentError(
                "likelihood='logits' would take the softmax once more of what the model returned: every value is "
                f"positive, and along dimension {dim} they sum to one. Pass likelihood='probabilities'."
            )


def check_probabilities(value: Tensor, dim: int) -> None:
    """Raise an ArgumentError where values are negative or do not sum to one along ``dim``."""
    sums = at_least_float32(value).sum(dim)
    if ((value < 0).any() | ((sums - 1).abs() > _TOLERANCE).any()).item():
        raise ArgumentError(
            f"likelihood='probabilities' needs probabilities that sum to one along dimension {dim}. The output, of "
            f"shape {tuple(value.shape)}, has values from {value.min().item():.3g} to {value.max().item():.3g}, with "
            f"sums from {sums.min().item():.3g} to {sums.max().item():.3g}. For unnormalised logits or logarithms of "
            "probabilities pass likelihood='logits', for classes in another dimension class_dim=; of one probability "
            "for each yes/no question return the logit and pass likelihood='binary_logits'."
        )
