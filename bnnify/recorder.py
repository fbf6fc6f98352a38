"""Recording a forward: the operations on tensors that depend on the sample."""

__all__ = ["Drawn", "Recorder"]

import functools
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .tape import Operation, Slot, Unsafe, leaves, mapped, several


class Drawn(Tensor):
    """A tensor that depends on the sample. It has a shape, but its numbers are for operations alone, not for Python."""

    drawn_value: Tensor
    slot: Slot
    recorder: "Recorder"

    # As for a plain tensor: torch's fused layers ask whether there is such a function.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, value: Tensor, slot: Slot, recorder: "Recorder") -> "Drawn":
        made = Tensor._make_wrapper_subclass(
            cls,
            value.shape,
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
            layout=value.layout,
            device=value.device,
        )
        # It has no memory; who asks for its address, such as a kernel of somebody's own, gets an error and not zero.
        torch._C._set_throw_on_mutable_data_ptr(made)
        made.drawn_value, made.slot, made.recorder = value, slot, recorder
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        recorder = next(leaf.recorder for leaf in leaves([args, kwargs or {}]) if isinstance(leaf, Drawn))
        return recorder.run(func, args, kwargs or {})

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise Unsafe  # pickle would look into it


class Recorder:
    """Runs the operations on drawn tensors, and writes them down.

    Attributes:
        safe: Whether what was recorded tells what the forward would do.
        operations: What was recorded.
        used: What it used that is not drawn, each with its version then.
        ended: Whether the forward is over. Somebody may have kept a drawn tensor of it.
    """

    def __init__(self) -> None:
        self.safe = True
        self.ended = False
        self.operations: list[Operation] = []
        self.used: list[tuple[Tensor, int]] = []
        self._slots = 0
        self._thread = threading.get_ident()

    def drawn(self, value: Tensor) -> Drawn:
        """A stand-in for ``value``, which depends on the sample."""
        self._slots += 1
        return Drawn(value, Slot(self._slots), self)

    def use(self, tensor: Tensor) -> None:
        """Note that a tensor that does not depend on the sample is needed for every sample, as it is now."""
        if type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and _is_strided(tensor) and not tensor.is_inference():
            self.used.append((tensor, tensor._version))
        else:
            self.safe = False

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The results of an operation, which are drawn too; in another thread, and when the forward has ended, not."""
        if self.ended or self._thread != threading.get_ident():
            self.safe = False
            return func(*_values(args), **_values(kwargs))
        if torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack() is not None:
            self.safe = False
            raise Unsafe  # it differentiates, or transforms a function
        found = func(*_values(args), **_values(kwargs))
        inputs = list(leaves([args, kwargs]))
        for leaf in inputs:
            if isinstance(leaf, Tensor) and not isinstance(leaf, Drawn):
                self.use(leaf)
            elif isinstance(leaf, torch.Generator):
                self.safe = False
        if not all(isinstance(tensor, Drawn | None) for tensor in _written(func, args, kwargs)):
            self.safe = False  # what was not drawn has been overwritten
        values = several(found)
        if not all(type(v) is Tensor and _is_strided(v) for v in values if isinstance(v, Tensor)):
            self.safe = False
        if not self.safe:
            return found  # from now on nothing has to be told apart
        drawn = {id(leaf.drawn_value): leaf for leaf in inputs if isinstance(leaf, Drawn)}
        results: list[Any] = []
        for value in values:
            if isinstance(value, Tensor) and id(value) not in drawn:  # an operation in place gives its argument back
                drawn[id(value)] = self.drawn(value)
            results.append(drawn.get(id(value), value))
        if any(_layout(tensor) != _layout(tensor.drawn_value) for tensor in drawn.values()):
            raise Unsafe  # one of them was given another shape, in place
        shapes = [result.shape if isinstance(result, Drawn) else None for result in results]
        self.operations.append(Operation(func, _slots(args), _slots(kwargs), _slots(results), shapes))
        return type(found)(results) if isinstance(found, (tuple, list)) else results[0]


@functools.cache
def _written_names(func: Any) -> tuple[tuple[int, str], ...]:
    """Where among its arguments those are that an operator writes to."""
    arguments = enumerate(func._schema.arguments)
    return tuple((n, a.name) for n, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Any]:
    names = _written_names(func)
    return leaves([kwargs[name] if name in kwargs else args[n] for n, name in names if name in kwargs or n < len(args)])


def _is_strided(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_quantized


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


def _values(values: Any) -> Any:
    return mapped(lambda value: value.drawn_value if isinstance(value, Drawn) else value, values)


def _slots(values: Any) -> Any:
    return mapped(lambda value: value.slot if isinstance(value, Drawn) else value, values)
