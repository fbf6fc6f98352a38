"""Mean and standard deviation of a stream of tensors, none of which is kept."""

__all__ = ["Mean", "Moments", "Pieces"]

from typing import Any

import torch
from torch import Tensor

from ..distributions.gaussian import at_least_float32
from .likelihood import Likelihood, has_values

PIECE = 2**22
"""The numbers of an output that are averaged at a time, so that what is computed on the way takes little memory."""


class Pieces:
    """How large outputs are divided: along the longest dimension in front of that of the classes."""

    def __init__(self, value: Tensor, likelihood: Likelihood) -> None:
        lengths = list(value.shape)
        if likelihood.has_classes:
            del lengths[-1 if likelihood.class_dim is None else likelihood.class_dim % value.ndim :]
        self._length = max(lengths, default=1)
        self._dim = lengths.index(self._length) if lengths else 0
        can_be_divided = type(value) is Tensor and has_values(value) and not value.is_nested
        self._count = min(self._length, value.numel() // PIECE) or 1 if can_be_divided else 1

    def of(self, whole: Tensor) -> tuple[Tensor, ...]:
        """Divide a tensor into views, which have its memory."""
        return (whole,) if self._count == 1 else whole.tensor_split(self._count, self._dim)

    def whole(self, piece: Tensor) -> Tensor:
        """Memory for what ``piece`` is the first piece of."""
        if self._count == 1:
            return torch.empty_like(piece)
        shape = list(piece.shape)
        shape[self._dim] = self._length
        return piece.new_empty(shape)


class Mean:
    """The mean of a stream of tensors, none of which is kept.

    Attributes:
        count: The number of tensors.
        mean: Their mean; None if there was none.
    """

    def __init__(self, pieces: Pieces) -> None:
        self.count = 0
        self.mean: Any = None
        self._pieces = pieces
        self._means: tuple[Tensor, ...] = ()

    def add(self, number: int, value: Tensor | None) -> None:
        """Add the piece of this number of the next tensor."""
        if value is None:
            return
        value = at_least_float32(value)
        if self.mean is None:
            self.mean = self._pieces.whole(value)
            self._means = self._pieces.of(self.mean)
        self.count += number == 0
        if self.count == 1:
            self._means[number].copy_(value)
        else:
            self._means[number].add_((value - self._means[number]) / self.count)


class Moments(Mean):
    """Mean and standard deviation of a stream of tensors, without the cancellation of E[x²] - E[x]²."""

    _squares: Any = None

    def add(self, number: int, value: Any) -> None:
        value = at_least_float32(value)
        difference = value - self._means[number] if self._means else None
        super().add(number, value)
        if self._squares is None:
            self._squares = torch.zeros_like(self.mean.real)
        if self.count > 1:
            spread = (difference * (value - self._means[number]).conj()).real  # |x|² of complex numbers
            self._pieces.of(self._squares)[number].add_(spread)

    def std(self) -> Tensor:
        """The standard deviation, in the memory of what was added up for it."""
        return self._squares.div_(max(self.count - 1, 1)).sqrt_()
