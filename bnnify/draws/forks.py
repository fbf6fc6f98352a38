"""Random numbers that differ between processes which are forked, as the workers of a server are.

A fork copies the random number generator, so that all workers would draw the same networks. As long as one keeps the
seed that it got so, its numbers are not those of the copy, but of generators that are seeded from it and from the place
of the worker among the forks. So the same program draws the same again, and no generator of the program is touched.
"""

__all__ = ["generator_of_fork", "next_seed"]

import itertools
import os
import threading

import torch


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


def next_seed(generator: torch.Generator | None = None) -> int:
    """A seed drawn from ``generator``. Default: ``None``, the program's own; forked processes get different ones."""
    seed = int(torch.randint(2**62, (), generator=generator))
    return hash((seed, *_place)) % 2**62 if generator is None and _has_seed_of_parent() else seed


def generator_of_fork(device: torch.device) -> torch.Generator | None:
    """The generator for the next random numbers on ``device`` in a forked process; None where the program's will do."""
    return torch.Generator(device).manual_seed(next_seed()) if _has_seed_of_parent() else None


def _has_seed_of_parent() -> bool:
    return bool(_place) and torch.initial_seed() == _seed
