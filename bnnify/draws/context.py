"""The draws in effect: those that this thread or task has entered; in backward those of the forward."""

__all__ = ["DrawnNetwork", "Entered", "Entry", "enter", "find", "in_effect", "last_entered", "leave", "next_number"]

import itertools
import warnings
from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from ..torch_internals import may_save_for_rerun
from .estimators import Estimator
from .replay import replaying

Entry: TypeAlias = tuple[Tensor, Tensor | Estimator]
"""The posterior mean that was drawn, and the sample or what an estimator makes of it."""


class DrawnNetwork(Protocol):
    """A :class:`~bnnify.draws.draw.Draw`, as far as it is used here.

    Attributes:
        table: The mean and the sample of each parameter, by the :class:`~bnnify.draws.slot.Active` of the place.
        forward_of: The module for one forward of which it was made, if any.
        may_run_again: True once a parameter was read in a region that may be run again in backward.
        outputs_without_graph: Those that were computed while it was in effect.
    """

    table: dict[Any, Entry]
    forward_of: nn.Module | None
    may_run_again: bool
    outputs_without_graph: Any


class Entered:
    """One ``with draw:``, which is in effect until it is left.

    Attributes:
        draw: The draw that was entered.
        number: Later ones have higher numbers.
        token: Belongs to the context in which it was entered; None after it was left.
        is_left: True once it was left from another context, as by the task that closes an abandoned generator.
        undo: Called on leaving.
    """

    __slots__ = ("draw", "is_left", "number", "token", "undo")

    def __init__(self, draw: DrawnNetwork, undo: Callable[[], None]) -> None:
        self.draw = draw
        self.number = next_number()
        self.token: Token[tuple[Entered, ...]] | None = None
        self.is_left = False
        self.undo = undo


_numbers = itertools.count()
next_number = _numbers.__next__
"""Numbers that tell what came first."""

_entered: ContextVar[tuple[Entered, ...]] = ContextVar("bnnify_draws", default=())


def enter(draw: DrawnNetwork, undo: Callable[[], None]) -> Entered:
    """Put ``draw`` in effect, before those that are: in this thread or task, and in tasks that start in it."""
    entered = Entered(draw, undo)
    entered.token = _entered.set((*(each for each in _entered.get() if not each.is_left), entered))
    return entered


def leave(entered: Entered, abandoned: bool = False) -> None:
    """Undo :func:`enter`, whatever else was entered or left meanwhile.

    ``abandoned`` says that a generator which held the draw is closed, which may happen anywhere.
    """
    now, token = _entered.get(), entered.token
    entered.token = None
    try:
        if token is not None:
            _entered.reset(token)
    except ValueError:  # this is not where it was entered
        entered.is_left = True
    _entered.set(tuple(each for each in now if each is not entered))
    entered.undo()
    if entered.is_left and not abandoned:
        warnings.warn(
            "A draw was left in another task or thread than it was entered in, and what ran in that one meanwhile did "
            "not see it: it used the posterior mean. So it is with a generator that yields inside `with bnn.draw():` "
            "and whose steps run in a thread pool or in tasks of their own, as servers do. Make the draw once, "
            "`draw = bnn.draw()`, and enter it around each step, `with draw:`, without a yield inside.",
            RuntimeWarning,
            stacklevel=3,
        )
    if not entered.is_left and any(each.number > entered.number and not each.is_left for each in now):
        warnings.warn(
            "A draw was left while one that was entered later is still in effect, as happens when two generators that "
            "hold draws take turns: Python cannot tell them apart, and both have used the draw that was entered last. "
            "Make the draw once, `draw = bnn.draw()`, and enter it around each step, `with draw:`, without a yield "
            "inside; or run each generator in a context of its own, `contextvars.copy_context().run(next, generator)`.",
            RuntimeWarning,
            stacklevel=3,
        )


def last_entered(draw: DrawnNetwork) -> Entered | None:
    """Find the last ``with draw:`` of this draw that this thread or task has yet to leave; None if there is none."""
    return next((each for each in reversed(_entered.get()) if each.draw is draw and each.token is not None), None)


def in_effect() -> tuple[DrawnNetwork, ...]:
    """Return the draws that are in effect, the innermost last."""
    replayed = replaying()
    here = (each for each in _entered.get() if not each.is_left)
    if replayed is None:
        return tuple(each.draw for each in here)
    return (*replayed.draws, *(each.draw for each in here if each.number > replayed.number))


def find(active: object, forward_of: nn.Module | None = None) -> Entry | None:
    """Find the entry of one parameter in the draws in effect; None if they have none.

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
                return _note_read(entered.draw, entry)
    for draw in () if replayed is None else reversed(replayed.draws):
        entry = draw.table.get(active)
        if entry is not None and (forward_of is None or draw.forward_of is not forward_of):
            return _note_read(draw, entry)
    return None


def _note_read(draw: DrawnNetwork, entry: Entry) -> Entry:
    """Return ``entry``; note first if it is read in a region that may be run again, as checkpointing does."""
    if not draw.may_run_again and (not torch.is_grad_enabled() or may_save_for_rerun()):
        draw.may_run_again = True
    return entry
