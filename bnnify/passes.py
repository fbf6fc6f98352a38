"""Passes of the same networks over batches, of which the loader is read only once."""

__all__ = ["GROUP_BYTES", "passes"]

from collections.abc import Generator, Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .batches import Arguments, called_with
from .sampler import Sampler
from .tape import Tape, Unsafe
from .trunk import Trunk

GROUP_BYTES = 2**28
"""So much of the inputs, and of what is kept of their trunks, is held at a time."""


def passes(
    module: nn.Module, batches: Iterable[Arguments], num_samples: int, *, antithetic: bool, several: bool
) -> Generator[tuple[int, Any], None, None]:
    """The number of a batch and an output of ``module`` for it, ``num_samples`` times for each batch.

    A network is drawn, runs over a group of batches, and makes room for the next one. For another group the same
    networks are drawn again. While the caller looks at an output, its network is in effect.

    Args:
        module: The model, in the mode in which it is to run.
        batches: The arguments of its forward, read once.
        num_samples: The number of networks.
        antithetic: See :class:`~bnnify.sampler.Sampler`.
        several: Whether there may be more than one batch.
    """
    sampler = Sampler(module, antithetic=antithetic, repeatable=several)
    trunk = Trunk(module, sampler) if num_samples > 1 else None
    unread = iter(batches)
    arguments = next(unread, None)  # before the first draw, as when a list of the batches had been made first
    start = 0
    while arguments is not None:
        group: list[_Batch] = []
        nbytes = 0
        draw = sampler.draw(0)
        while arguments is not None and (not group or nbytes < GROUP_BYTES):
            batch = _Batch(module, arguments)
            with draw:
                with called_with(module, arguments):
                    output = batch.first(trunk)
                yield start + len(group), output
            group.append(batch)
            nbytes += batch.nbytes
            arguments = next(unread, None)
        for number in range(1, num_samples):
            del draw  # and with it the hold on the memory that the next one takes
            draw = sampler.draw(number)
            for index, batch in enumerate(group, start):
                with draw:
                    yield index, batch.next(sampler)
        start += len(group)


class _Batch:
    """A batch through which networks pass, and how the next ones may do so."""

    def __init__(self, module: nn.Module, arguments: Arguments) -> None:
        self._module = module
        self._args, self._kwargs = arguments
        self._tape: Tape | None = None

    @property
    def nbytes(self) -> int:
        leaves = pytree.tree_leaves((self._args, dict(self._kwargs)))
        inputs = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
        return inputs + (self._tape.nbytes if self._tape else 0)

    def first(self, trunk: Trunk | None) -> Any:
        if trunk is None:
            return self._module(*self._args, **self._kwargs)
        output, self._tape = trunk.forward(self._args, self._kwargs)
        return output

    def next(self, sampler: Sampler) -> Any:
        if self._tape is not None:
            try:
                return self._tape.replay(sampler.samples)
            except Unsafe:
                self._tape = None
        return self._module(*self._args, **self._kwargs)
