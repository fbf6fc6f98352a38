"""Which draws are in effect: those that this thread or task has entered; in backward those of the forward."""

__all__ = ["Active", "Entered", "Entry", "enter", "find", "in_effect", "last_entered", "leave", "next_number"]

import itertools
import threading
import warnings
from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from .estimators import Estimator
from .replay import replaying

if TYPE_CHECKING:
    from .draw import Draw

Entry: TypeAlias = tuple[Tensor, Tensor | Estimator]
"""The posterior mean that was drawn, and the sample or what an estimator makes of it."""


class Entered:
    """One ``with draw:``, which is in effect until it is left.

    Attributes:
        draw: What was entered.
        number: Later ones have higher numbers.
        token: Belongs to the context in which it was entered; None after it was left.
        is_left: Whether it was left from another context, as by the task that closes an abandoned generator.
        undo: What else there is to do on leaving.
    """

    __slots__ = ("draw", "is_left", "number", "token", "undo")

    def __init__(self, draw: "Draw", undo: Callable[[], None]) -> None:
        self.draw = draw
        self.number = next_number()
        self.token: Token[tuple[Entered, ...]] | None = None
        self.is_left = False
        self.undo = undo


_numbers = itertools.count()
next_number = _numbers.__next__
"""Numbers that tell what came first."""

_entered: ContextVar[tuple[Entered, ...]] = ContextVar("bnnify_draws", default=())


def enter(draw: "Draw", undo: Callable[[], None]) -> Entered:
    """Put ``draw`` in effect, before those that are: in this thread or task, and in tasks that start in it."""
    entered = Entered(draw, undo)
    entered.token = _entered.set((*(each for each in _entered.get() if not each.is_left), entered))
    return entered


def leave(entered: Entered) -> None:
    """Undo :func:`enter`, whatever else was entered or left meanwhile."""
    now, token = _entered.get(), entered.token
    assert token is not None
    entered.token = None
    try:
        _entered.reset(token)
    except ValueError:  # this is not where it was entered
        entered.is_left = True
    _entered.set(tuple(each for each in now if each is not entered))
    entered.undo()
    if not entered.is_left and any(each.number > entered.number and not each.is_left for each in now):
        warnings.warn(
            "A draw was left while one that was entered later is still in effect, as happens when two generators that "
            "hold draws take turns: Python cannot tell them apart, and both have used the draw that was entered last. "
            "Make the draw once, `draw = bnn.draw()`, and enter it around each step, `with draw:`, without a yield "
            "inside; or run each generator in a context of its own, `contextvars.copy_context().run(next, generator)`.",
            RuntimeWarning,
            stacklevel=3,
        )


def last_entered(draw: "Draw") -> Entered | None:
    """The last ``with draw:`` of this draw that this thread or task has yet to leave; None if there is none."""
    return next((each for each in reversed(_entered.get()) if each.draw is draw and each.token is not None), None)


def in_effect() -> tuple["Draw", ...]:
    """The draws that are in effect, the innermost last."""
    replayed = replaying()
    here = (each for each in _entered.get() if not each.is_left)
    if replayed is None:
        return tuple(each.draw for each in here)
    return (*replayed.draws, *(each.draw for each in here if each.number > replayed.number))


def find(active: "Active", forward_of: nn.Module | None = None) -> Entry | None:
    """What the draws in effect have for one parameter; None if they have nothing.

    Args:
        active: The parameter.
        forward_of: The module, if any, whose forward asks in order to draw what is missing. What it drew for itself in
            a forward that is run again does not count: it has to draw again, as it did then.
    """
    replayed = replaying()
    for entered in reversed(_entered.get()):
        if not entered.is_left and (replayed is None or entered.number > replayed.number):
            entry = entered.draw.table.get(active)
            if entry is not None:
                return _noted(entered.draw, entry)
    for draw in () if replayed is None else reversed(replayed.draws):
        entry = draw.table.get(active)
        if entry is not None and (forward_of is None or draw.forward_of is not forward_of):
            return _noted(draw, entry)
    return None


def _noted(draw: "Draw", entry: Entry) -> Entry:
    """``entry``, after a note whether it is read in a region that may be run again, as checkpointing does."""
    if not draw.may_run_again and (
        not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    ):
        draw.may_run_again = True
    return entry


class _Lookup(dict[Any, Any]):
    def __missing__(self, active: "Active") -> Entry | None:
        return find(active)


class Active(threading.local):
    """What reading one Bayesian parameter gives at this moment. Copies and pickles start outside any draw.

    Attributes:
        entry: What is in effect here. Compiled code reads it by its path, so that equal blocks share one graph, and
            before each call: the compiler takes a property that is implemented in C for an attribute, which it neither
            looks into nor takes for a constant.
        traced: What a draw that is made in compiled code itself has put in effect; None everywhere else.
        replaced: Whether a read found another value in the place of the parameter.
    """

    entry = property(_Lookup().__getitem__)

    def __init__(self) -> None:
        self.traced: Entry | None = None
        self.replaced = False

    def __reduce__(self) -> tuple[Any, ...]:
        return Active, ()
