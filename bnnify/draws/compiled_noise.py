"""Noise in compiled code that differs between processes with different data, however these were seeded."""

__all__ = ["compiled_noise"]

import torch
from torch import Tensor

from .processes import num_ranks, seed_of_process


def compiled_noise(tensor: Tensor) -> Tensor:
    """ε ~ N(0, 1) in the shape, dtype and device of ``tensor``, contiguous, as a part of the graph.

    The compiler draws from the program's own generator, which the ranks of a process group have as a rule seeded alike.
    There only a seed is drawn so, and an operator of ours, which the compiler calls and does not look into, makes the
    noise of it and of the place of the process. It is a function of its inputs, and may be run again.
    """
    if torch.compiler.is_exporting() or num_ranks() == 1:
        return torch.randn(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return _noise(tensor.detach(), torch.randint(2**62, (), device="cpu"))


@torch.library.custom_op("bnnify::noise", mutates_args=())
def _noise(like: Tensor, seed: Tensor) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(seed_of_process(int(seed)))
    return torch.empty(like.shape, dtype=like.dtype, device=like.device).normal_(generator=generator)


@_noise.register_fake
def _(like: Tensor, seed: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)
