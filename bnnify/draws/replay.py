"""Draws that are in effect again in a backward pass, for the regions that activation checkpointing runs once more."""

__all__ = ["Replay", "is_nested_pass", "replay", "replaying", "saved_tensors"]

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
    """

    def __init__(self) -> None:
        self.draws: tuple[Any, ...] = ()
        self.number = -1

    def __call__(self) -> None:
        """Nothing is left to do at the end of the backward pass."""


class _Thread(threading.local):
    """The passes with a replay that run in this thread, one inside the other."""

    def __init__(self) -> None:
        self.passes: list[weakref.ref[Replay]] = []

    def innermost(self, but: Replay | None = None) -> Replay | None:
        alive = (reference() for reference in reversed(self.passes))
        return next((found for found in alive if found is not None and found is not but), None)

    def add(self, made: Replay) -> None:
        if self.innermost() is not made:
            self.passes = [each for each in self.passes if each() is not None] + [weakref.ref(made)]


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
    found = None if task is None else _replays.get(task) or _thread.innermost()
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


def is_nested_pass() -> bool:
    """Tell whether re-entrant checkpointing has started this backward pass inside another one with a replay."""
    task = backward_pass()
    return task is not None and _thread.innermost(_replays.get(task)) is not None


def saved_tensors(ctx: Any) -> tuple[Tensor, ...]:
    """``ctx.saved_tensors`` of the function that made a sample, whose backward may run more than once.

    With re-entrant checkpointing the pass of each region goes through that function, and the outer pass does so for
    the KL, after all of them. After the first of them autograd has dropped what it saved.
    """
    if torch.compiler.is_compiling():
        return ctx.saved_tensors
    kept: tuple[Tensor, ...] | None = getattr(ctx, "kept", None)
    saved: tuple[Tensor, ...] = kept or ctx.saved_tensors
    if is_nested_pass():
        ctx.kept = saved
    elif kept is not None and not keeps_graph():
        ctx.kept = None
    return saved
