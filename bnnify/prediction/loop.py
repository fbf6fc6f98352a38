"""Passes of the same networks over batches, of which the loader is read only once."""

__all__ = ["GROUP_BATCHES", "GROUP_BYTES", "passes"]

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from ..draws.outputs import tensors_in
from ..torch_internals import is_transformed
from .batches import Arguments
from .known_code import is_plain_tensor
from .sampler import Sampler
from .trunk import Trunk

GROUP_BYTES = 2**28
"""So much of the inputs is held at a time."""

GROUP_BATCHES = 256
"""So many batches are held at a time, whatever they are made of."""


def passes(
    module: nn.Module,
    batches: Iterable[Arguments],
    num_samples: int,
    *,
    output: str | int | Callable[[Any], Any] | None = None,
    antithetic: bool = False,
) -> Iterator[tuple[int, Any]]:
    """The number of a batch and what ``module`` gives for it, ``num_samples`` times for each batch.

    A network is drawn, runs over a group of batches, and makes room for the next one. Where there is another group, the
    same networks are drawn again for it.

    Args:
        module: The model, in the mode in which it is to run.
        batches: The arguments of its forward, read once.
        num_samples: The number of networks.
        output: Which part of the model's output: a key or attribute, an index, or a function, which is called while the
            network is in effect. Default: all of it.
        antithetic: See :class:`~bnnify.prediction.sampler.Sampler`.
    """
    unread = iter(batches)
    group, following = _next_group([], unread)
    # Where one group is all, no network has to be drawn twice.
    sampler = Sampler(module, antithetic=antithetic, repeatable=bool(following))
    trunk = Trunk(module, sampler, None if callable(output) else output, on=num_samples > 1)
    start = 0
    while group:
        for number in range(num_samples):
            draw = sampler.draw(number)
            for index, arguments in enumerate(group, start):
                with draw:
                    found = trunk.forward(index, *arguments)
                    found = output(found) if callable(output) else found
                yield index, found
            del draw  # and with it the hold on the memory that the next one takes
        start += len(group)
        del group, arguments  # which make room for the next group, as do their tapes
        trunk.forget()
        group, following = _next_group(following, unread)


def _next_group(first: list[Arguments], unread: Iterator[Arguments]) -> tuple[list[Arguments], list[Arguments]]:
    """The batches from ``first`` on that are held at a time, and the one that comes after them, if there is one."""
    group, nbytes = list(first), sum(map(_nbytes, first))
    beginnings = [_beginning(arguments) for arguments in first]
    for arguments in unread:
        if group and [_beginning(group[0]), _beginning(group[-1])] != [beginnings[0], beginnings[-1]]:
            raise ValueError(
                "A batch has changed while the next one was read: what gives the batches reuses their memory, and "
                "predict holds several at a time. Give copies, for example (batch.clone() for batch in loader)."
            )
        if group and (nbytes >= GROUP_BYTES or len(group) >= GROUP_BATCHES):
            return group, [arguments]
        group.append(arguments)
        beginnings.append(_beginning(arguments))
        nbytes += _nbytes(arguments)
    return group, []


def _beginning(arguments: Arguments) -> str:
    """The first numbers of the tensors of a batch."""
    plain = (tensor for tensor in tensors_in(arguments) if is_plain_tensor(tensor) and not is_transformed(tensor))
    tensors = (tensor for tensor in plain if tensor.numel())
    return str([tensor[(0,) * (tensor.ndim - 1)].flatten()[:8].tolist() for tensor in tensors])


def _nbytes(arguments: Arguments) -> int:
    """The memory of the tensors of a batch, wherever in it they are; of sparse ones, what they would take if dense."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(arguments))
