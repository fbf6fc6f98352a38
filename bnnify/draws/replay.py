"""Draws that are in effect again in a backward pass, for the regions that activation checkpointing runs once more."""

__all__ = ["Replay", "replay", "replaying", "waiting", "with_waiting"]

import sys
import threading
import types
import weakref
from typing import Any

import torch
from torch import Tensor

from ..torch_internals import after_this_backward, backward_pass, current_function, is_accumulation, keeps_graph


class Replay:
    """The draws that one backward pass replays; callable, because the autograd engine keeps it as a callback.

    Attributes:
        draws: The draws that were in effect in the forward, the innermost last.
        number: Draws with a higher number were entered later, in the backward pass itself.
        waiting: Samples that nested passes have read, by the function that made them, and what collects the gradient.
    """

    def __init__(self) -> None:
        self.draws: tuple[Any, ...] = ()
        self.number = -1
        self.waiting: dict[Any, tuple[Tensor, Tensor]] = {}
        self._keeps_graph = keeps_graph()

    def __call__(self) -> None:
        """Pass on, at the end of the backward pass, the gradients that nothing in it has taken."""
        late = {drawn: leaf.grad for drawn, leaf in self.waiting.values() if leaf.grad is not None}
        self.waiting.clear()
        if late:
            torch.autograd.backward([*late], [*late.values()], retain_graph=self._keeps_graph)


class _Thread(threading.local):
    """The passes with a replay that run in this thread, one inside the other."""

    def __init__(self) -> None:
        self.passes: list[weakref.ref[Replay]] = []

    def alive(self) -> list[Replay]:
        return [found for reference in self.passes if (found := reference()) is not None]

    def add(self, made: Replay) -> None:
        alive = self.alive()
        if not alive or alive[-1] is not made:
            self.passes = [*map(weakref.ref, alive), weakref.ref(made)]


_thread = _Thread()
# By graph task too, because one backward pass runs a thread per device. Re-entrant checkpointing starts passes of its
# own inside the outer one; these find the replay by their thread.
_replays: weakref.WeakValueDictionary[int, Replay] = weakref.WeakValueDictionary()


def replay(draws: tuple[Any, ...], number: int) -> None:
    """Let :func:`replaying` give these draws until the backward pass that runs now is over, even if it fails."""
    task = backward_pass()
    if task is None:  # somebody has called the hook of a tensor by hand
        return
    made = _replays.get(task)
    if made is None:
        # The engine drops its callbacks with the backward pass they belong to, also with one that failed: the replay
        # is held by nothing else, and is over exactly when that pass is.
        made = Replay()
        after_this_backward(made)
        _replays[task] = made
    _thread.add(made)
    made.draws, made.number = draws, number


def replaying() -> Replay | None:
    """Find the replay for a read in a region that is run again; None outside of backward passes.

    The hooks of a backward pass read too, and these are no recomputations. Checkpointing runs a region again with
    gradients enabled, never to accumulate a gradient, and a function of autograd does it in its own backward.
    """
    task = backward_pass()
    found = None if task is None else _replays.get(task) or next(reversed(_thread.alive()), None)
    if found is None:
        return None
    node = current_function()
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        return found if _runs_backward(node) else None
    return found if torch.is_grad_enabled() and not is_accumulation(node) else None


def _runs_backward(node: Any) -> bool:
    """Tell whether the backward of a function written in Python is running, and not a hook before or after it."""
    code = node._forward_cls.backward.__code__
    frame: types.FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


def waiting(drawn: Tensor) -> Tensor:
    """Return the sample ``drawn`` as a region reads it that re-entrant checkpointing runs again; elsewhere itself.

    Such a region has a backward pass of its own, and that of the rest reaches the same parameters, for the KL. So that
    each of them gets its gradient once, as DDP wants it, the region is given a leaf, whose gradient waits.
    """
    if torch.compiler.is_compiling() or backward_pass() is None or not drawn.requires_grad:
        return drawn
    maker, outer = drawn.grad_fn, next(iter(_thread.alive()), None)
    if outer is None or not hasattr(getattr(maker, "_forward_cls", None), "takes_waiting") or not _is_reentrant():
        return drawn
    if maker not in outer.waiting:
        outer.waiting[maker] = drawn, drawn.detach().requires_grad_()
    return outer.waiting[maker][1]


def with_waiting(ctx: Any, grad: Any) -> Any:
    """The gradient of the sample that the function of ``ctx`` made, with what waits for it."""
    if torch.compiler.is_compiling():
        return grad
    task = backward_pass()
    found = None if task is None else _replays.get(task)
    late = None if found is None else found.waiting.pop(ctx, None)
    if late is None or late[1].grad is None:
        return grad
    return late[1].grad if grad is None else grad + late[1].grad


def _is_reentrant() -> bool:
    """Tell whether a function of autograd computes with gradients in its own backward, as such checkpointing does."""
    node = current_function()
    is_python = isinstance(node, torch.autograd.function.BackwardCFunction)
    return torch.is_grad_enabled() and is_python and _runs_backward(node)
