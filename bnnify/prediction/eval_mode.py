"""Eval mode for as long as a block runs, in any number of threads."""

__all__ = ["evaluating"]

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..modules.parameters import is_bayesian

_lock = threading.Lock()
# By module, because models share them: how many blocks are running, and the flag that it had before the first of them.
_running: weakref.WeakKeyDictionary[nn.Module, tuple[int, bool]] = weakref.WeakKeyDictionary()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set every module to eval mode, and after the last of such blocks each to its own flag again.

    Only flags are set. ``eval()`` may do more: a LoRA layer merges what it has learned into a weight, where no draw
    reaches it. A Bayesian layer that has done so is told to take it out for as long as the block runs.
    """
    modules = list(model.modules())
    with _lock:
        for module in modules:
            count, flag = _running.get(module, (0, module.training))
            _running[module] = count + 1, flag
        merged = [module for module in modules if _running[module] == (1, False) and _may_merge(module)]
        for module in merged:
            module.train()
        for module in modules:
            module.training = False
    try:
        yield
    finally:
        with _lock:
            ended = []
            for module in modules:
                count, flag = _running.pop(module)
                if count > 1:
                    _running[module] = count - 1, flag
                else:
                    ended.append((module, flag))
            for module, flag in ended:
                if not flag and _may_merge(module):
                    module.training = True
                    module.eval()
            for module, flag in ended:
                module.training = flag


def _may_merge(module: nn.Module) -> bool:
    return is_bayesian(module) and type(module).train is not nn.Module.train
