"""A draw: one sample of every Bayesian parameter, in effect for whole forwards and put back for their backward."""

__all__ = ["Active", "Draw", "Make", "has_draw", "note_replacement", "read", "unsampled", "weight_sample"]

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from .context import Active, Entry, enter, find, last_entered, leave
from .errors import DrawError
from .estimators import Estimator
from .outputs import hook_outputs
from .posterior import sample
from .sharding import is_unsharded_form, unsharded

if TYPE_CHECKING:
    from .parameters import BayesianParameter

Make: TypeAlias = Callable[["BayesianParameter"], Tensor | Estimator]


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
        make: What the draw holds of a parameter, from the :class:`BayesianParameter`: a sample, or an estimator, with
            which the layer is another network at each call; that is for one forward. Point posteriors are left at their
            means. Default: a sample.
        outputs_of: A module in which every output that is computed while the draw is in effect remembers it for the
            backward pass. Default: none.
        forward_of: The module for one forward of which the draw is made; it leaves a parameter for which another draw
            is already in effect to that draw. Default: none, and the draw covers all parameters.
    """

    def __init__(
        self,
        parameters: Iterable["BayesianParameter"],
        make: Make | None = None,
        *,
        outputs_of: nn.Module | None = None,
        forward_of: nn.Module | None = None,
    ) -> None:
        made: dict[int, Tensor | Estimator] = {}
        self.entries: list[tuple[Active, Entry]] = []
        self.outputs_of = outputs_of
        self.forward_of = forward_of
        self.may_run_again = False
        """Whether a parameter was read in a region that may be run again in backward."""
        self._entered: list[Any] = []
        for parameter in parameters:
            if forward_of is not None and has_draw(parameter.active, forward_of):
                continue
            mean = parameter.mean
            if id(mean) not in made:
                made[id(mean)] = mean if parameter.is_point else (make or weight_sample)(parameter)
            self.entries.append((parameter.active, (mean, made[id(mean)])))
        if not torch.compiler.is_compiling():
            self.table = dict(self.entries)

    def __enter__(self) -> "Draw":
        if torch.compiler.is_compiling():
            self._entered.append([active.traced for active, _ in self.entries])
            for active, entry in self.entries:
                active.traced = entry
        else:
            self._entered.append(enter(self, hook_outputs(self.outputs_of)))
        return self

    def __exit__(self, *exception: object) -> None:
        if torch.compiler.is_compiling():
            for (active, _), before in zip(self.entries, self._entered.pop(), strict=True):
                active.traced = before
        else:
            entered = last_entered(self) or self._entered[-1]  # the latter where another task or thread leaves
            self._entered.remove(entered)
            leave(entered)


def weight_sample(parameter: "BayesianParameter") -> Tensor:
    """One reparameterized sample of the parameter, from which gradients flow to its mean and its ρ."""
    return sample(parameter.kept_mean, parameter.rho)


def read(active: Active, value: Tensor) -> Tensor:
    """What a read of a Bayesian parameter gives whose slot holds ``value``: the sample in a draw, the mean outside.

    Only the parameter that the draw was made for is replaced, in whatever form torch has put it there. A value that
    somebody put there during the draw (``functional_call``, a hypernetwork) is given back as it stands.
    """
    entry = _entry(active)
    if entry is None:
        return value
    mean, drawn = entry
    if value is mean or is_traced_form(value, mean):
        return drawn.sample() if isinstance(drawn, Estimator) else drawn
    if not isinstance(drawn, Estimator) and is_unsharded_form(value, mean):
        return unsharded(drawn, value)
    if is_same_memory(value, mean):
        # The gradient is for the tensor that was put here: the difference is zero, and its gradient that of the mean.
        return (drawn.sample() if isinstance(drawn, Estimator) else drawn) + (value - mean)
    return note_replacement(active, value)


def unsampled(active: Active, value: Tensor | None) -> Estimator | None:
    """What the draw in effect keeps in place of a sample of the parameter whose slot holds ``value``."""
    entry = _entry(active)
    return entry[1] if entry and entry[0] is value and isinstance(entry[1], Estimator) else None


def has_draw(active: Active, forward_of: nn.Module | None = None) -> bool:
    """Whether a draw of the parameter is in effect, one that a forward of ``forward_of`` made for itself aside."""
    return _entry(active, forward_of) is not None


def _entry(active: Active, forward_of: nn.Module | None = None) -> Entry | None:
    return (active.traced or active.entry) if torch.compiler.is_compiling() else find(active, forward_of)


def note_replacement(active: Active, value: Tensor) -> Tensor:
    """Give back ``value``, which somebody has put where the parameter was; ``audit`` asks for this afterwards."""
    if not torch.compiler.is_compiling():
        active.replaced = True
    return value


def is_traced_form(value: Tensor, mean: Tensor) -> bool:
    """Whether ``torch.export`` has put a stand-in without values in the place of the parameter.

    Raises:
        DrawError: The stand-in is one of AOTAutograd without ``torch.compile``, which tells not what it stands for.
    """
    if isinstance(value, FunctionalTensor):
        raise DrawError(
            f"A parameter of shape {tuple(mean.shape)} that a draw is made for is traced by AOTAutograd alone, which "
            "would trace the posterior mean. Use torch.compile or torch.export inside the draw, or trace the plain "
            "network of bnnify.freeze(bnn, num_samples=1) or bnnify.collapse(bnn)."
        )
    return isinstance(value, FakeTensor) and value.fake_mode.from_tensor(mean) is value


def is_same_memory(value: Tensor, mean: Tensor) -> bool:
    """Whether ``value`` is the parameter itself in another tensor, as ``functional_call`` gets it from ``detach()``."""
    if torch.compiler.is_compiling() or mean.is_meta:
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    are_plain = all(type(each) in (Tensor, nn.Parameter) and each.layout is torch.strided for each in (value, mean))
    same_place = are_plain and value.data_ptr() == mean.data_ptr()
    return same_place and (value.shape, value.stride(), value.dtype) == (mean.shape, mean.stride(), mean.dtype)
