"""Standard normal noise ε ~ N(0, 1), of the shape, strides, dtype and device of a tensor."""

__all__ = ["noise_like", "standard_normal_"]

import torch
from torch import Tensor

from ..torch_internals import in_transform
from .compiled_noise import compiled_noise
from .processes import generator_of_process
from .sharding import is_distributed, sharded_noise


def noise_like(tensor: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """ε ~ N(0, 1). Of a sharded tensor every shard gets noise of its own, and the replicas of a shard get the same.

    The random numbers are those of ``generator``, on the device of the tensor. Default: ``None``, the program's own;
    processes with different data get different ones of these, see :mod:`.processes`.
    """
    if is_distributed(tensor):
        return sharded_noise(tensor, generator)
    if torch.compiler.is_compiling():
        return compiled_noise(tensor)  # contiguous, whatever strides the compiler gives the tensor: see below
    if generator is None and in_transform():
        return torch.randn_like(tensor)
    return standard_normal_(torch.empty_like(tensor, requires_grad=False), generator)


def standard_normal_(tensor: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Fill a dense ``tensor`` with ε ~ N(0, 1), with the numbers that :func:`noise_like` would give it.

    Torch has a fast way to draw many numbers for contiguous memory alone. That of another layout, such as
    ``torch.channels_last``, is filled in the order in which it lies there.
    """
    in_memory = tensor if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))
    in_memory.normal_(generator=generator or generator_of_process(tensor.device))
    return tensor
