"""Random numbers that differ between processes with different data, however these were seeded.

A fork copies the random number generator, so that all workers of a server would draw the same networks. And the ranks
of a ``torch.distributed`` group are as a rule seeded alike, so that all would train with one network. In both cases the
random numbers are not those of the program's generator, but of generators that are seeded from it and from the place of
the process: its number among the forks, and its data-parallel index. So the same program draws the same again, a
generator whose state was saved goes on as it would have done, and none is touched.

Ranks that compute one network together (tensor parallelism) have one data-parallel index, and take the seed of the
first of them.
"""

__all__ = [
    "Together",
    "generator_of_process",
    "next_seed",
    "num_ranks",
    "place_of_process",
    "seed_of_process",
    "together",
]

import itertools
import os
import threading
from collections.abc import Hashable, Sequence
from typing import Any

import torch
import torch.distributed as dist


class _Fork(threading.local):
    """The last fork that this thread has asked for: its number, and the seed that the child gets."""

    number = 0
    seed = 0


_fork = _Fork()
_numbers = itertools.count(1)
_place: tuple[int, ...] = ()
"""The number of the fork that made this process, after those that made its parents."""


def _before() -> None:
    _fork.number, _fork.seed = next(_numbers), torch.initial_seed()


def _in_child() -> None:
    global _place, _seed
    _place, _seed = (*_place, _fork.number), _fork.seed


_seed = 0
if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(before=_before, after_in_child=_in_child)


class Together(threading.local):
    """The ranks that compute the networks of the model that this thread looked at last together with this one.

    Attributes:
        groups: They are joined by these process groups, in each of which all ranks have to agree in turn.
        first: The lowest of their ranks, which is the data-parallel index of all; None if this rank is alone.
    """

    groups: Sequence[Any] = ()
    first: int | None = None


together = Together()


def num_ranks() -> int:
    """The number of ranks in the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def place_of_process() -> Hashable:
    """What tells this process, and those that compute with it, from the others; None if there are no others."""
    forks = _place if _has_seed_of_parent() else ()
    ranks = () if num_ranks() == 1 else (dist.get_rank() if together.first is None else together.first,)
    return (forks, ranks) if forks or ranks else None


def seed_of_process(seed: int) -> int:
    """The seed of this process, and of those that compute with it, from one that others may have too."""
    place = place_of_process()
    return seed if place is None else hash((seed, place)) % 2**62


def next_seed(generator: torch.Generator | None = None) -> int:
    """A seed drawn from ``generator``. Default: ``None``, the program's own; other processes get different ones."""
    seed = int(torch.randint(2**62, (), generator=generator, device="cpu" if generator is None else generator.device))
    if generator is not None:
        return seed
    return seed if place_of_process() is None else seed_of_process(_agreed(seed))


def generator_of_process(device: torch.device) -> torch.Generator | None:
    """The generator for the next random numbers on ``device``; None where the program's will do."""
    return None if place_of_process() is None else torch.Generator(device).manual_seed(next_seed())


def _agreed(seed: int) -> int:
    """The seed of the first of the ranks that compute together."""
    for group in together.groups:
        shared = [seed]
        dist.broadcast_object_list(shared, group=group, group_src=0)
        seed = shared[0]
    return seed


def _has_seed_of_parent() -> bool:
    return bool(_place) and torch.initial_seed() == _seed
