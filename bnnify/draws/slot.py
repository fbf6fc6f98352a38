"""Reads of one Bayesian parameter: the sample of the draw in effect, or the mean."""

__all__ = ["Active", "has_draw", "note_replacement", "read", "unsampled"]

import threading
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DrawError
from ..torch_internals import FakeTensor, FunctionalTensor, unwrapped
from .context import Entry, find
from .estimators import Estimator
from .replay import waiting
from .sharding import is_unsharded_form, unsharded


class _Lookup(dict[Any, Any]):
    def __missing__(self, active: "Active") -> Entry | None:
        return find(active)


class Active(threading.local):
    """The draw that reads of one Bayesian parameter see now. Copies and pickles start outside any draw.

    Attributes:
        entry: The mean and its sample; None outside any draw. Compiled code reads it by its path, so that equal blocks
            share one graph, and before each call: the compiler takes a property that is implemented in C for an
            attribute, which it neither looks into nor takes for a constant.
        traced: The entry of a draw that is made in compiled code; None everywhere else.
        replaced: True once a read found another value in the place of the parameter.
    """

    entry = property(_Lookup().__getitem__)

    def __init__(self) -> None:
        self.traced: Entry | None = None
        self.replaced = False

    def __reduce__(self) -> tuple[Any, ...]:
        return Active, ()


def read(active: Active, value: Tensor) -> Tensor:
    """Read a Bayesian parameter whose place holds ``value``: the sample inside a draw, the mean outside.

    Only the parameter that the draw was made for is replaced, in whatever form torch has put it there. A value that
    somebody put there during the draw (``functional_call``, a hypernetwork) is given back as it stands.
    """
    entry = _entry(active)
    if entry is None:
        return value
    mean, drawn = entry
    if value is mean or is_traced_form(value, mean):
        return drawn.sample() if isinstance(drawn, Estimator) else waiting(drawn)
    if not isinstance(drawn, Estimator) and is_unsharded_form(value, mean):
        return unsharded(waiting(drawn), value, mean)
    if is_same_memory(value, mean):
        # The gradient is for the tensor that was put here: the difference is zero, and its gradient that of the mean.
        return (drawn.sample() if isinstance(drawn, Estimator) else waiting(drawn)) + (value - mean)
    return note_replacement(active, value)


def unsampled(active: Active, value: Tensor | None) -> Estimator | None:
    """Return the estimator that the draw in effect has for the parameter whose place holds ``value``; None if none."""
    entry = _entry(active)
    return entry[1] if entry and entry[0] is value and isinstance(entry[1], Estimator) else None


def has_draw(active: Active, forward_of: nn.Module | None = None) -> bool:
    """Tell whether a draw of the parameter is in effect; one that a forward of ``forward_of`` made does not count."""
    return _entry(active, forward_of) is not None


def _entry(active: Active, forward_of: nn.Module | None = None) -> Entry | None:
    if active.traced is not None:
        return active.traced
    return active.entry if torch.compiler.is_compiling() else find(active, forward_of)


def note_replacement(active: Active, value: Tensor) -> Tensor:
    """Return ``value``, which somebody has put where the parameter was, and note that for ``audit``."""
    if not torch.compiler.is_compiling():
        active.replaced = True
    return value


def is_traced_form(value: Tensor, mean: Tensor) -> bool:
    """Tell whether ``torch.export`` has put a stand-in without values in the place of the parameter.

    Raises:
        DrawError: The stand-in is one of AOTAutograd without ``torch.compile``, which does not tell what it stands for.
    """
    if isinstance(value, FunctionalTensor):
        raise DrawError(
            f"A parameter of shape {tuple(mean.shape)} that a draw is made for is traced by AOTAutograd alone, which "
            "would trace the posterior mean. Use torch.compile or torch.export inside the draw, or trace the plain "
            "network of bnnify.freeze(bnn, num_samples=1) or bnnify.collapse(bnn)."
        )
    return isinstance(value, FakeTensor) and value.fake_mode.from_tensor(mean) is value


def is_same_memory(value: Tensor, mean: Tensor) -> bool:
    """Tell whether ``value`` has the memory of the parameter, as ``functional_call`` gets it from ``detach()``."""
    if torch.compiler.is_compiling() or mean.is_meta:
        return False
    value = unwrapped(value)
    are_plain = all(type(each) in (Tensor, nn.Parameter) and each.layout is torch.strided for each in (value, mean))
    same_place = are_plain and value.data_ptr() == mean.data_ptr()
    return same_place and (value.shape, value.stride(), value.dtype) == (mean.shape, mean.stride(), mean.dtype)
