"""Hooks on outputs, which put the draws they were computed in back when a backward pass reaches them."""

__all__ = ["hook_outputs", "remember", "take_off_copied_hooks", "tensors_in"]

import dataclasses
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..torch_internals import forward_hooks, is_compiled, is_transformed, keeps_graph
from .context import DrawnNetwork, in_effect, next_number
from .replay import replay


def remember(output: Any) -> None:
    """Put the draws that are in effect now back when a backward pass reaches ``output``, which was computed in them.

    Regions under activation checkpointing run again inside the backward pass, after the draws have been left, and a
    hook on every tensor of the output fires before any of them does. Where no region can run again, nothing is kept.
    Compiled code has the draws in its graph and needs no hook.
    """
    if torch.compiler.is_compiling():
        return
    draws = in_effect()
    if not any(draw.may_run_again for draw in draws):
        return
    if torch.is_grad_enabled():
        for tensor in tensors_in(output):
            if tensor.grad_fn is not None and not is_transformed(tensor):
                tensor.register_hook(_TensorHook(draws))
    else:
        draws[-1].outputs_without_graph.add(output, draws)


class OutputsWithoutGraph:
    """Outputs that were computed without a graph, as long as they live.

    Re-entrant checkpointing makes those of a region, a tensor or a tuple of tensors, part of a graph afterwards.
    """

    def __init__(self) -> None:
        self._outputs: dict[int, tuple[weakref.ref[Tensor], tuple[DrawnNetwork, ...]]] = {}

    def add(self, output: Any, draws: tuple[DrawnNetwork, ...]) -> None:
        """Note that ``output`` was computed in these draws."""
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, Tensor):
                forget = functools.partial(self._outputs.pop, id(tensor))  # gets the dead reference as the default
                self._outputs[id(tensor)] = weakref.ref(tensor, forget), draws

    def remember(self) -> None:
        """Put the draws back when a backward pass reaches one that is part of a graph now, and forget the others."""
        for reference, draws in list(self._outputs.values()):
            tensor = reference()
            if tensor is not None and tensor.grad_fn is not None:
                tensor.register_hook(_TensorHook(draws))
        self._outputs.clear()


def hook_outputs(root: nn.Module | None) -> Callable[[], None]:
    """Hook ``root`` and the modules in it so that their outputs are remembered; return a function that undoes it."""
    hooked = []
    with _lock:
        for module in [] if root is None else _eager_modules(root, set()):
            hook = next((each for each in list(forward_hooks(module).values()) if isinstance(each, _ModuleHook)), None)
            if hook is None:
                hook = _ModuleHook()
                hook.remove = module.register_forward_hook(hook).remove
            hook.users += 1
            hooked.append(hook)

    def undo() -> None:
        with _lock:
            for hook in hooked:
                hook.users -= 1
                if hook.users == 0:
                    hook.remove()

    return undo


def take_off_copied_hooks(module: nn.Module) -> None:
    """Remove the forward hook that ``module`` itself has got by being copied or pickled inside a draw."""
    for number, hook in list(forward_hooks(module).items()):
        if isinstance(hook, _ModuleHook) and hook.users == 0:
            del forward_hooks(module)[number]


_lock = threading.RLock()  # within it, the garbage collector may close a generator that leaves a draw


class _ModuleHook:
    """The forward hook that all draws share in which the outputs of one module are remembered.

    One that was copied or pickled with its module has no users, and takes itself off.
    """

    def __init__(self) -> None:
        self.users = 0
        self.remove: Callable[[], None] = lambda: None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if self.users == 0:
            take_off_copied_hooks(module)
        else:
            remember(output)

    def __reduce__(self) -> tuple[Any, ...]:
        return _ModuleHook, ()


class _TensorHook:
    """A hook that puts draws back when a backward pass reaches a tensor, and drops them if that frees the graph."""

    def __init__(self, draws: tuple[DrawnNetwork, ...]) -> None:
        self._draws = draws

    def __call__(self, grad: Tensor) -> None:
        if self._draws:
            replay(self._draws, next_number())
        if not keeps_graph():
            self._draws = ()


def _eager_modules(root: nn.Module, seen: set[nn.Module]) -> Iterator[nn.Module]:
    # Compiled code needs no hook, and would be compiled anew for those inside of it.
    if not is_compiled(root) and root not in seen:
        seen.add(root)
        yield root
        for child in root.children():
            yield from _eager_modules(child, seen)


def tensors_in(output: Any) -> Iterator[Tensor]:
    """Yield every tensor in a forward's output: in containers, dataclasses and the attributes of plain objects."""
    return _tensors(output, set())


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in seen or isinstance(value, (str, bytes, int, float, type, nn.Module)) or value is None:
        return
    seen.add(id(value))
    children: list[Any] = []
    if isinstance(value, Mapping):
        children += value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        children += value
    if dataclasses.is_dataclass(value):
        children += [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    children += getattr(value, "__dict__", {}).values()
    for child in children:
        yield from _tensors(child, seen)
