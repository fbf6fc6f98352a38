"""The tensors beside a Bayesian parameter in its module: ρ, and the mean and the scale of its prior."""

__all__ = ["INITIAL_STD", "PRIOR_MEAN", "RHO", "PriorMean", "as_buffer", "from_buffer"]

from typing import Any

import torch
from torch import Tensor, nn

from ..torch_internals import in_transform, is_traced
from .sharding import is_distributed, whole

RHO, PRIOR_MEAN, INITIAL_STD = "_rho", "_prior_mean", "_initial_std"
"""Endings of names: ``weight_rho`` is ρ, ``weight_prior_mean`` the pretrained value that a centred prior keeps, and
``weight_initial_std`` the buffer with the rms of the σ that the posterior started with."""


class PriorMean(nn.Parameter):
    """The mean of a prior: a parameter, so that FSDP shards it and DDP broadcasts it once, which nothing trains.

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
    """Return a copy of a scalar as a module keeps it: of shape (1,), and not sharded.

    Of shape () the compiler would take one in float64 for a Python float, and compile twice.
    """
    return whole(scalar).detach().clone().reshape(1)


def from_buffer(buffer: Tensor) -> Tensor | float:
    """Return the scalar in a buffer: a number on the CPU, a tensor on a GPU, which need not be waited for.

    The tensor is not the buffer itself, which DDP overwrites before each forward.
    """
    if is_distributed(buffer):
        return buffer.full_tensor().reshape(())
    is_plain = type(buffer) is Tensor and not in_transform()
    if torch.compiler.is_compiling() or is_traced() or not (is_plain and buffer.is_cpu):
        return buffer.clone().reshape(())
    return buffer.item()
