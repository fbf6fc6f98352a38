"""The loop over networks and batches, in which a loader is read once and each network sees every batch."""

__all__ = ["GROUP_BATCHES", "GROUP_BYTES", "beginning", "run_networks"]

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from ..draws.outputs import tensors_in
from ..errors import ArgumentError
from ..torch_internals import is_transformed
from .batches import Arguments
from .known_code import is_plain_tensor
from .networks_at_once import NetworksAtOnce
from .sampler import Sampler
from .trunk import Trunk

GROUP_BYTES = 2**28
"""The bytes of inputs that are held at a time."""

GROUP_BATCHES = 256
"""The batches that are held at a time, however small they are."""


def run_networks(
    module: nn.Module,
    batches: Iterable[Arguments],
    networks: range,
    *,
    output: str | int | Callable[[Any], Any] | None = None,
    antithetic: bool = False,
    at_once: int = 1,
    seed: int | None = None,
) -> Iterator[tuple[int, Any]]:
    """Yield the number of a batch and an output for it, once for each of the ``networks``.

    A network is drawn, runs over a group of batches, and makes room for the next one. If there is another group, the
    same networks are drawn again for it.

    Args:
        module: The model, in the mode in which it is to run.
        batches: The arguments of its forward, read once.
        networks: The numbers of the networks; under ``antithetic`` they start with an even one.
        output: Which part of the model's output: a key or attribute, an index, or a function, which is called while the
            network is in effect. Default: all of it.
        antithetic: See :class:`~bnnify.prediction.sampler.Sampler`. Default: ``False``.
        at_once: How many networks run in one forward. Default: ``1``.
        seed: See :class:`~bnnify.prediction.sampler.Sampler`. Default: ``None``.
    """
    remaining = iter(batches)
    group, next_batch = _read_group([], remaining)
    # If one group is all there is, no network has to be drawn twice.
    sampler = Sampler(module, antithetic=antithetic, repeatable=bool(next_batch), seed=seed)
    trunk = Trunk(module, sampler, None if callable(output) else output, on=len(networks) > at_once == 1)
    start = 0
    while group:
        for first in networks[::at_once]:
            if at_once > 1:
                together = NetworksAtOnce(module, sampler, range(first, min(first + at_once, networks.stop)))
                for index, arguments in enumerate(group, start):
                    yield from ((index, found) for found in together.forward(*arguments, output))
                continue
            draw = sampler.draw(first)
            for index, arguments in enumerate(group, start):
                with draw:
                    found = trunk.forward(index, *arguments)
                    found = output(found) if callable(output) else found
                yield index, found
                del found  # so that there is room for the next output
            del draw  # lets the next network use its memory
        start += len(group)
        del group, arguments  # make room for the next group
        trunk.forget()
        group, next_batch = _read_group(next_batch, remaining)


def _read_group(first: list[Arguments], remaining: Iterator[Arguments]) -> tuple[list[Arguments], list[Arguments]]:
    """Read the batches that are held at a time, from ``first`` on, and the one after them, if there is one."""
    group, nbytes = list(first), sum(map(_nbytes, first))
    beginnings = [beginning(arguments) for arguments in first]
    for arguments in remaining:
        if group and [beginning(group[0]), beginning(group[-1])] != [beginnings[0], beginnings[-1]]:
            raise ArgumentError(
                "A batch has changed while the next one was read: what gives the batches reuses their memory, and "
                "predict holds several at a time. Give copies, for example (batch.clone() for batch in loader)."
            )
        if group and (nbytes >= GROUP_BYTES or len(group) >= GROUP_BATCHES):
            return group, [arguments]
        group.append(arguments)
        beginnings.append(beginning(arguments))
        nbytes += _nbytes(arguments)
    return group, []


def beginning(arguments: Arguments) -> str:
    """Write down the first numbers of the tensors of a batch."""
    plain = (tensor for tensor in tensors_in(arguments) if is_plain_tensor(tensor) and not is_transformed(tensor))
    tensors = (tensor for tensor in plain if tensor.numel())
    return str([tensor[(0,) * (tensor.ndim - 1)].flatten()[:8].tolist() for tensor in tensors])


def _nbytes(arguments: Arguments) -> int:
    """Count the bytes of the tensors of a batch; of sparse ones, those that they would take if dense."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(arguments))
