"""Draws that are in effect again in a backward pass, for the regions that activation checkpointing runs once more."""

__all__ = ["is_nested_pass", "replay", "replayed", "saved_tensors"]

import threading
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class _Replay:
    """What to read again in one backward pass; callable, because the autograd engine keeps it as a callback."""

    def __init__(self, entries: Mapping[Any, Any]) -> None:
        self.entries = entries

    def __call__(self) -> None:
        """Nothing is left to do at the end of the backward pass."""


class _Thread(threading.local):
    replay: weakref.ref[_Replay] | None = None


_thread = _Thread()
# By graph task too, because one backward pass runs a thread per device. Re-entrant checkpointing starts passes of its
# own inside the outer one; these find the replay by their thread.
_replays: weakref.WeakValueDictionary[int, _Replay] = weakref.WeakValueDictionary()


def replay(entries: Mapping[Any, Any]) -> None:
    """Let :func:`replayed` give ``entries`` until the backward pass that runs now is over, even if it fails."""
    # The engine drops its callbacks with the backward pass they belong to, also with one that failed: the replay
    # is held by nothing else, and is over exactly when that pass is.
    made = _Replay(entries)
    torch.autograd.Variable._execution_engine.queue_callback(made)
    _replays[torch._C._current_graph_task_id()] = made
    _thread.replay = weakref.ref(made)


def replayed(key: Any) -> Any:
    """The entry of ``key`` that the backward pass which runs now replays; None outside of one, or if it has none."""
    task = torch._C._current_graph_task_id()
    if task == -1:
        return None
    found = _replays.get(task) or (_thread.replay and _thread.replay())
    return found.entries.get(key) if found else None


def is_nested_pass() -> bool:
    """Whether the backward pass that runs now was started by re-entrant checkpointing inside one with a replay."""
    task = torch._C._current_graph_task_id()
    return task not in (-1, *_replays.keys()) and bool(_thread.replay and _thread.replay())


def saved_tensors(ctx: Any) -> tuple[Tensor, ...]:
    """``ctx.saved_tensors`` of the function that made a sample, whose backward may run more than once.

    With re-entrant checkpointing the pass of each region goes through that function, and the outer pass does so for
    the KL. After the first of them autograd has dropped what it saved.
    """
    if torch.compiler.is_compiling():
        return ctx.saved_tensors
    saved: tuple[Tensor, ...] = getattr(ctx, "kept", None) or ctx.saved_tensors
    if is_nested_pass():
        ctx.kept = saved
    return saved
