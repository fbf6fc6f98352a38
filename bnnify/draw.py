"""A draw: one sample of every Bayesian parameter, in effect for whole forwards and put back for their backward."""

__all__ = ["Active", "Draw", "Make", "note_replacement", "read", "tensors_in", "unsampled", "weight_sample"]

import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from .estimators import Estimator
from .posterior import sample
from .replay import replay, replayed
from .sharding import is_unsharded_form, unsharded

if TYPE_CHECKING:
    from .parameters import BayesianParameter

Entry: TypeAlias = tuple[Tensor, Tensor | Estimator]
Make: TypeAlias = Callable[["BayesianParameter"], Tensor | Estimator]


class Active(threading.local):
    """What reading one Bayesian parameter gives in this thread: ``(mean, sample)``, or None for the mean itself.

    Where an estimator takes the place of the sample, it makes one when asked. ``replaced`` tells that a read found
    another value in the place of the parameter.

    It lives beside the parameter rather than in a table of the draw, so that compiled code finds it by a path and
    equal blocks share one graph. Copies and pickles start outside any draw.
    """

    def __init__(self) -> None:
        self.entry: Entry | None = None
        self.replaced = False

    def __reduce__(self) -> tuple[Any, ...]:
        return Active, ()


class Draw:
    """One network from the posterior: a sample of each Bayesian parameter, made now and the same until it is dropped.

    While it is entered (``with draw:``), in this thread, every read of a Bayesian parameter gives its sample. It may be
    entered again; leaving it restores what was in effect before. Parameters that are tied share one sample.

    Args:
        parameters: The Bayesian parameters to sample.
        make: What the draw holds of a parameter, from the :class:`BayesianParameter`: a sample, or an estimator, with
            which the layer is another network at each call; that is for one forward. Point posteriors are left at their
            means. Default: a sample.
        keep_active: Leave a parameter for which a draw is already in effect to that draw. Default: ``False``.
    """

    def __init__(
        self, parameters: Iterable["BayesianParameter"], make: Make | None = None, keep_active: bool = False
    ) -> None:
        made: dict[int, Tensor | Estimator] = {}
        self._entries: list[tuple[Active, Entry]] = []
        self._before: list[list[Entry | None]] = []
        for parameter in parameters:
            entry = parameter.active.entry if keep_active else None
            if entry is None:
                mean = parameter.mean
                if id(mean) not in made:
                    made[id(mean)] = mean if parameter.is_point else (make or weight_sample)(parameter)
                entry = mean, made[id(mean)]
            self._entries.append((parameter.active, entry))

    def __enter__(self) -> "Draw":
        self._before.append([active.entry for active, _ in self._entries])
        for active, entry in self._entries:
            active.entry = entry
        return self

    def __exit__(self, *exception: object) -> None:
        for (active, _), entry in zip(self._entries, self._before.pop(), strict=True):
            active.entry = entry

    def replay_in_backward(self, output: Any) -> None:
        """Put this draw back when the backward pass reaches ``output``, for activation checkpointing.

        Checkpointed regions run again inside the backward pass, after the draw has been left. A hook on every tensor of
        the output fires before any of them does. Compiled code has the draw in its graph and needs no hook.
        """
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        for tensor in tensors_in(output):
            if tensor.grad_fn is not None and not torch._C._functorch.is_functorch_wrapped_tensor(tensor):
                tensor.register_hook(self._replay)

    @property
    def output_hook(self) -> "_OutputHook":
        """A forward hook with which every output of a module, computed while this draw is in effect, remembers it."""
        return _OutputHook(self)

    @property
    def in_effect(self) -> bool:
        """Whether reads in this thread give the samples of this draw."""
        return all(active.entry is entry for active, entry in self._entries[:1])

    def _replay(self, grad: Tensor) -> None:
        replay(dict(self._entries))


def weight_sample(parameter: "BayesianParameter") -> Tensor:
    """One reparameterized sample of the parameter, from which gradients flow to its mean and its ρ."""
    return sample(parameter.kept_mean, parameter.rho)


def read(active: Active, value: Tensor) -> Tensor:
    """What a read of a Bayesian parameter gives whose slot holds ``value``: the sample in a draw, the mean outside.

    Only the parameter that the draw was made for is replaced. A value that somebody put there during the draw
    (``functional_call``, a hypernetwork) is given back as it stands.
    """
    entry = _entry(active)
    if entry is None:
        return value
    mean, drawn = entry
    if isinstance(drawn, Estimator):
        return drawn.sample() if value is mean else note_replacement(active, value)
    if value is mean:
        return drawn
    if is_unsharded_form(value, mean):
        return unsharded(drawn, value)
    return note_replacement(active, value)


def unsampled(active: Active, value: Tensor | None) -> Estimator | None:
    """What the draw in effect keeps in place of a sample of the parameter whose slot holds ``value``."""
    entry = _entry(active)
    return entry[1] if entry and entry[0] is value and isinstance(entry[1], Estimator) else None


def _entry(active: Active) -> Entry | None:
    return active.entry if torch.compiler.is_compiling() else replayed(active) or active.entry


def note_replacement(active: Active, value: Tensor) -> Tensor:
    """Give back ``value``, which somebody has put where the parameter was; ``audit`` asks for this afterwards."""
    if not torch.compiler.is_compiling():
        active.replaced = True
    return value


class _OutputHook:
    """The forward hook of an explicit draw; a copy or pickle of the module carries it without the draw."""

    def __init__(self, draw: Draw | None = None) -> None:
        self._draw = draw

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._draw is not None and not torch.compiler.is_compiling() and self._draw.in_effect:
            self._draw.replay_in_backward(output)

    def __reduce__(self) -> tuple[Any, ...]:
        return _OutputHook, ()


def tensors_in(output: Any) -> Iterator[Tensor]:
    """Every tensor in a forward's output: in containers, dataclasses and the attributes of plain objects."""
    return _tensors(output, set())


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in seen or isinstance(value, (str, bytes, int, float, type, nn.Module)) or value is None:
        return
    seen.add(id(value))
    children: list[Any] = []
    if isinstance(value, Mapping):
        children += value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        children += value
    if dataclasses.is_dataclass(value):
        children += [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    children += getattr(value, "__dict__", {}).values()
    for child in children:
        yield from _tensors(child, seen)
