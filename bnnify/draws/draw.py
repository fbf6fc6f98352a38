"""A draw: one sample of every Bayesian parameter, in effect for whole forwards and put back for their backward."""

__all__ = ["Draw", "Drawable"]

from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..errors import DrawError
from .context import Entry, enter, last_entered, leave
from .estimators import Estimator
from .outputs import OutputsWithoutGraph, hook_outputs
from .slot import Active, has_draw


class Drawable(Protocol):
    """A Bayesian parameter, as far as a draw has to know it."""

    @property
    def active(self) -> Active: ...

    @property
    def mean(self) -> Tensor: ...

    def sample(self) -> Tensor:
        """Make one sample; the mean itself if there is no noise."""


_Parameter = TypeVar("_Parameter", bound=Drawable)


class Draw:
    """One network from the posterior: a sample of each Bayesian parameter, made now and the same until it is dropped.

    While it is entered (``with draw:``), every read of a Bayesian parameter gives its sample: in this thread or
    ``asyncio`` task, and in the tasks that are started there (it belongs to the context, see :mod:`contextvars`). It
    may be entered any number of times; leaving it takes back that entry and no other. Parameters that are tied share
    one sample.

    Generators of one thread share a context. One that holds a draw across a ``yield`` leaves it in effect for whoever
    runs meanwhile; instead, enter it around each step::

        >>> def outputs(bnn, steps):
        ...     draw = bnn.draw()
        ...     for x in steps:
        ...         with draw:
        ...             output = bnn.module(x)
        ...         yield output

    Args:
        parameters: The Bayesian parameters to sample.
        make: ``make(parameter)`` returns the weight sample, or an estimator for a single forward. Default: a sample.
        outputs_of: A module in which every output that is computed while the draw is in effect remembers it for the
            backward pass. Default: none.
        forward_of: The module for one forward of which the draw is made; it leaves a parameter for which another draw
            is already in effect to that draw. Default: none, and the draw covers all parameters.
        traced: True if the code that enters the draw is being compiled, with the draw in its graph. It has to say so
            itself: where the compiler gives up on that code, it still compiles what is called from there. Default:
            whether this call is being compiled.
    """

    def __init__(
        self,
        parameters: Iterable[_Parameter],
        make: Callable[[_Parameter], Tensor | Estimator] | None = None,
        *,
        outputs_of: nn.Module | None = None,
        forward_of: nn.Module | None = None,
        traced: bool | None = None,
    ) -> None:
        made: dict[int, Tensor | Estimator] = {}
        self.entries: list[tuple[Active, Entry]] = []
        self.outputs_of = outputs_of
        self.forward_of = forward_of
        self.may_run_again = False
        self.outputs_without_graph = OutputsWithoutGraph()
        self._entered: list[Any] = []
        for parameter in parameters:
            if forward_of is not None and has_draw(parameter.active, forward_of):
                continue
            mean = parameter.mean
            if id(mean) not in made:
                made[id(mean)] = parameter.sample() if make is None else make(parameter)
            self.entries.append((parameter.active, (mean, made[id(mean)])))
        self.traced = torch.compiler.is_compiling() if traced is None else traced
        if not self.traced:
            self.table = dict(self.entries)

    def __enter__(self) -> "Draw":
        if self.traced:
            self._entered.append([active.traced for active, _ in self.entries])
            for active, entry in self.entries:
                active.traced = entry
        else:
            self._entered.append(enter(self, hook_outputs(self.outputs_of)))
        return self

    def __exit__(self, *exception: object) -> None:
        if self.traced:
            for (active, _), before in zip(self.entries, self._entered.pop(), strict=True):
                active.traced = before
        else:
            if not self._entered:
                raise DrawError("A draw was left that was not entered. Use it as `with draw:`.")
            entered = last_entered(self) or self._entered[-1]  # the latter where another task or thread leaves
            self._entered.remove(entered)
            self.outputs_without_graph.remember()
            leave(entered, abandoned=exception[:1] == (GeneratorExit,))
