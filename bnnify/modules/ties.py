"""Tied parameters stay tied while ``load_state_dict(assign=True)`` puts new tensors in their places."""

__all__ = ["keep_ties"]

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

# By a parameter that was replaced: the load that did it, and its successor. torch hands one list through a whole load.
_successors: Any = WeakIdKeyDictionary()


@contextmanager
def keep_ties(module: nn.Module, names: Iterable[str], load: list[str]) -> Iterator[None]:
    """Give a parameter that the block replaces the successor that it got in another place of the same load.

    Args:
        module: The module that is loaded in the block.
        names: Which of its parameters to look at.
        load: The list of missing keys, or that of errors, of ``_load_from_state_dict``: one for all modules of a load.
    """
    before = {name: parameter for name in names if (parameter := module._parameters.get(name)) is not None}
    yield
    for name, old in before.items():
        new = module._parameters.get(name)
        known_load, successor = _successors.get(old, (None, None))
        if known_load is load and (first := successor()) is not None:
            module._parameters[name] = first
        elif new is not None and new is not old:
            _successors[old] = load, weakref.ref(new)
