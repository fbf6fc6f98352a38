"""Eval mode while a block runs, in any number of threads."""

__all__ = ["evaluating"]

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..modules.settings import is_bayesian

_lock = threading.Lock()
# By module, because models share modules: the number of running blocks, and the flag before the first of them.
_running: weakref.WeakKeyDictionary[nn.Module, tuple[int, bool]] = weakref.WeakKeyDictionary()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set every module to eval mode while the block runs, and afterwards restore the flag of each.

    Only flags are set, because ``eval()`` may do more: a LoRA layer merges its update into a weight, where no draw
    reaches it. A Bayesian layer that has merged is told to unmerge while the block runs.
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
