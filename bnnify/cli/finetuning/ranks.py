"""The processes that torchrun starts."""

__all__ = ["Ranks", "process_group"]

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together.

    Attributes:
        rank: Its number; that with 0 writes.
        world_size: How many there are.
    """

    rank: int = 0
    world_size: int = 1

    def share(self, order: Sequence[int], even: bool) -> Sequence[int]:
        """Return the part of this process; ``even`` leaves out what would give some more than others."""
        end = len(order) // self.world_size * self.world_size if even else len(order)
        return order[:end][self.rank :: self.world_size]

    def total(self, *values: float) -> list[float]:
        """Sum numbers over all processes."""
        if self.world_size == 1:
            return list(values)
        on_gpu = dist.get_backend() == "nccl"
        summed = torch.tensor(values, dtype=torch.float64, device="cuda" if on_gpu else "cpu")
        dist.all_reduce(summed)
        return summed.tolist()


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Join the processes that torchrun started, each with a GPU of its own where there are some."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        yield Ranks()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield Ranks(dist.get_rank(), world_size)
    finally:
        dist.destroy_process_group()
