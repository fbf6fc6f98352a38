"""The operations of one forward that depend on the sample, to be run again with another sample."""

__all__ = ["Operation", "Slot", "Tape", "Unsafe", "leaves", "mapped", "several"]

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


class Unsafe(Exception):
    """The operations that were recorded do not tell what the forward would do."""


@dataclass(frozen=True)
class Slot:
    """The place of a tensor that is another one for each sample."""

    number: int


@dataclass
class Operation:
    """One call of an operator, in whose arguments and results slots stand for the tensors that depend on the sample.

    Of such results ``shapes`` has the shapes, and ``last`` the slots that are not used any more after the call.
    """

    function: Any
    args: Any
    kwargs: dict[str, Any]
    results: list[Any]
    shapes: list[torch.Size | None]
    last: tuple[int, ...] = ()


class Tape:
    """The operations of one forward that depend on the sample.

    Args:
        operations: The operations, in order.
        used: What they use that does not depend on the sample, each with its version when it was used.
        sampled: The slot of each sample, by the identity of the posterior mean.
        output: The leaves of the output, of which those that depend on the sample are slots.
        structure: How the output is made of them.
    """

    def __init__(
        self,
        operations: list[Operation],
        used: list[tuple[Tensor, int]],
        sampled: dict[int, int],
        output: list[Any],
        structure: pytree.TreeSpec,
    ) -> None:
        self._operations = operations
        self._used = used
        self._sampled = sampled
        self._output = output
        self._structure = structure
        needed = set(_slots(output))
        for operation in reversed(operations):
            slots = set(_slots([operation.args, operation.kwargs, operation.results]))
            operation.last = tuple(slots - needed)
            needed |= slots

    @property
    def nbytes(self) -> int:
        """The memory of what it keeps."""
        kept = [tensor.untyped_storage() for tensor, _ in self._used if not isinstance(tensor, nn.Parameter)]
        return sum({storage._cdata: storage.nbytes() for storage in kept}.values())

    def replay(self, samples: Mapping[int, Tensor]) -> Any:
        """The output of the network with these samples, by the identity of the posterior means.

        Raises:
            Unsafe: Something that the operations use has changed since, or the forward would have seen another number
                or shape than in its recording.
        """
        if any(tensor._version != version for tensor, version in self._used):
            raise Unsafe
        slots: dict[int, Any] = {number: samples[mean] for mean, number in self._sampled.items()}
        with torch._C._DisableAutocast():  # its casts are among the operations
            for operation in self._operations:
                found = operation.function(*_filled(operation.args, slots), **_filled(operation.kwargs, slots))
                for value, result, shape in zip(several(found), operation.results, operation.shapes, strict=True):
                    if isinstance(result, Slot) and value.shape == shape:
                        slots[result.number] = value
                    elif isinstance(result, Slot) or type(value) is not type(result) or value != result:
                        raise Unsafe
                for number in operation.last:
                    slots.pop(number, None)
        return pytree.tree_unflatten(_filled(self._output, slots), self._structure)


def leaves(values: Any) -> Iterator[Any]:
    """Everything in the arguments of an operation, of which some may be lists."""
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, (tuple, list, dict)):
            yield from leaves(value)
        else:
            yield value


def mapped(function: Callable[[Any], Any], values: Any) -> Any:
    """``function`` of everything in the arguments of an operation."""
    if isinstance(values, dict):
        return {key: mapped(function, value) for key, value in values.items()}
    if isinstance(values, (tuple, list)):
        return [mapped(function, value) for value in values]
    return function(values)


def several(found: Any) -> Any:
    """The results of an operation, which may be a single one."""
    return found if isinstance(found, (tuple, list)) else (found,)


def _filled(values: Any, slots: dict[int, Any]) -> Any:
    return mapped(lambda value: slots[value.number] if type(value) is Slot else value, values)


def _slots(values: Any) -> Iterator[int]:
    return (leaf.number for leaf in leaves(values) if isinstance(leaf, Slot))
