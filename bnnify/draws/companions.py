"""What stands beside a Bayesian parameter in its module: ρ, and the mean and the scale of its prior."""

__all__ = ["INITIAL_STD", "PRIOR_MEAN", "RHO", "PriorMean", "as_buffer", "from_buffer"]

from typing import Any

import torch
from torch import Tensor, nn

from ..torch_internals import in_transform, is_traced

RHO, PRIOR_MEAN, INITIAL_STD = "_rho", "_prior_mean", "_initial_std"
"""What follows a parameter's own name in the names of its ρ, of the pretrained value that a centred prior keeps, and
of the buffer with the rms of the σ that its posterior started with."""


class PriorMean(nn.Parameter):
    """The mean of a prior: a parameter, which FSDP shards and DDP sends around once, but one that nothing trains.

    ``requires_grad`` is False and stays so: ``model.requires_grad_(True)``, which ends a freeze, does not reach it.
    (A DTensor stays what it is; its gradient is cut off where it is read.)
    """

    requires_grad = property(lambda self: False, lambda self, value: None)

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> "PriorMean":
        return super().__new__(cls, data, requires_grad=False)

    def requires_grad_(self, requires_grad: bool = True) -> "PriorMean":
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return PriorMean, (self.data,)


def as_buffer(scalar: Tensor) -> Tensor:
    """A scalar in the form in which a module keeps it: of shape (1,), and not sharded.

    Of shape () the compiler would take one in float64 for a Python float, and compile twice.
    """
    return (scalar.full_tensor() if hasattr(scalar, "full_tensor") else scalar).detach().clone().reshape(1)


def from_buffer(buffer: Tensor) -> Tensor | float:
    """The scalar to compute with: a number where it is at hand, which on a GPU would have to be waited for.

    As a tensor it is not the buffer itself, which DDP overwrites before each forward.
    """
    if hasattr(buffer, "full_tensor"):
        return buffer.full_tensor().reshape(())
    is_plain = type(buffer) is Tensor and not in_transform()
    if torch.compiler.is_compiling() or is_traced() or not (is_plain and buffer.is_cpu):
        return buffer.clone().reshape(())
    return buffer.item()
