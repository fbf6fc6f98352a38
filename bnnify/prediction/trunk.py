"""Compute the trunk of a model, which comes before and beside its Bayesian weights, once for each batch.

The first network of a batch runs as always, and the operations on tensors that depend on its samples are recorded. For
the next networks these are run again, without Python. Nobody can see from outside whether Python would do something
else for another network, so this is done for published code alone (see :mod:`.known_code`). Such code looks at tensors
and changes them through operations only, and the recorded ones have to show that the forward changed only what it made
itself, drew no random number, and saw no number that another network would not show. Any other model runs once for each
network.
"""

__all__ = ["Changed", "Tape", "Trunk"]

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..torch_internals import (
    TorchDispatchMode,
    draws_random_numbers,
    is_observed,
    tree_leaves,
    tree_map,
    written_arguments,
)
from .batches import called_with, choose
from .known_code import State, is_known, is_plain, is_plain_tensor
from .sampler import Sampler

LIMIT = 2**28
"""The bytes of trunks that are kept at a time."""

_KNOWN_OPERATORS = ("aten", "torchvision")
"""The namespaces of operators whose results depend on nothing but their arguments."""


class Changed(Exception):
    """This network shows Python another number or shape than the one whose forward was recorded."""


class Trunk:
    """Run the forwards of a model, and its trunk once for each batch where that is sure to give the same.

    Args:
        module: The model.
        sampler: Draws its networks; the last one is in effect in each forward.
        output: Which part of the model's output, as in :func:`~bnnify.prediction.batches.choose`. Default: all of it.
        on: Record at all: if there is more than one network. Default: ``True``.
    """

    def __init__(
        self, module: nn.Module, sampler: Sampler, output: str | int | None = None, *, on: bool = True
    ) -> None:
        self._module, self._sampler, self._output = module, sampler, output
        self._tapes: dict[int, Tape] = {}
        beside = [each for p in sampler.parameters for each in (*p.companions.values(), *p.of_prior.values())]
        noisy = {id(each) for each in (*(p.mean for p in sampler.parameters), *beside)}
        self._weights = {id(p) for p in module.parameters() if p.ndim > 1 and id(p) not in noisy}
        self._on = on and bool(self._weights) and not is_observed() and is_known(module)
        if self._on:
            self._state = State(module)

    def forward(self, batch: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The chosen output for batch number ``batch``, which has these arguments each time."""
        if self._on and batch in self._tapes:
            try:
                return self._tapes[batch].replay(self._sampler.samples)
            except Changed:
                self._on = False
        if self._on and is_plain((*args, *kwargs.values())) and sum(t.nbytes for t in self._tapes.values()) < LIMIT:
            return self._recorded(batch, args, kwargs)
        return self._run(args, kwargs)

    def forget(self) -> None:
        """Drop what is recorded, to make room for other batches."""
        self._tapes.clear()

    def _run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        with called_with(self._module, (args, kwargs)):
            found = self._module(*args, **kwargs)
        return choose(found, self._output)

    def _recorded(self, batch: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        recorder = _Recorder(self._sampler.samples)
        recorder.protect([*self._module.parameters(), *self._module.buffers(), *args, *kwargs.values()])
        with recorder:
            found = self._run(args, kwargs)
        tape = recorder.tape(found)
        # If every weight is needed again, there is no trunk. A layer that keeps something may do so for any batch.
        saves = tape is not None and not self._weights <= {id(constant) for constant in tape.constants}
        if tape is None or not saves or not self._state.is_unchanged():
            self._on = False
        else:
            self._tapes[batch] = tape
            found = tree_map(lambda leaf: _copy(leaf) if recorder.is_constant(leaf) else leaf, found)
        return found


@dataclass
class Tape:
    """The operations of one forward that depend on the samples; tensors without memory stand in for such tensors.

    Attributes:
        calls: Operator, arguments, keyword arguments, results, and the ids of the stand-ins not needed afterwards.
        constants: The tensors among the arguments that do not depend on the samples.
        sampled: The stand-in of each sample, by the id of the posterior mean.
        output: The output of the forward.
    """

    calls: list[tuple[Any, Any, Any, list[Any], set[int]]]
    constants: list[Tensor]
    sampled: dict[int, Tensor]
    output: Any

    @property
    def nbytes(self) -> int:
        """The bytes of the constants."""
        return sum({_memory(each): each.nbytes for each in self.constants if type(each) is Tensor}.values())

    def replay(self, samples: Mapping[int, Tensor]) -> Any:
        """The output of the network with these samples, by the ids of the posterior means.

        Raises:
            Changed: Python would have seen another number or shape, and might have done something else.
        """
        now = {id(stand_in): samples[mean] for mean, stand_in in self.sampled.items()}
        for operator, args, kwargs, results, finished in self.calls:
            args, kwargs = tree_map(lambda leaf: now.get(id(leaf), leaf), (args, kwargs))
            for value, result in zip(tree_leaves(operator(*args, **kwargs)), results, strict=True):
                if value.shape != result.shape if isinstance(result, Tensor) else value != result:
                    raise Changed
                if isinstance(result, Tensor):
                    now[id(result)] = value
            for each in finished:
                del now[each]
        return tree_map(lambda leaf: now[id(leaf)] if id(leaf) in now else _copy(leaf), self.output)


class _Recorder(TorchDispatchMode):
    """Record the operations on tensors that depend on the samples, which are given by the ids of the means."""

    def __init__(self, samples: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._usable = True
        self._protected: set[int] = set()
        self._stand_ins: Any = WeakTensorKeyDictionary()
        self._tape = Tape([], [], {mean: self._stand_in(sample) for mean, sample in samples.items()}, None)
        self.protect(samples.values())

    def protect(self, values: Iterable[Any]) -> None:
        """Give up the recording once one of these tensors is written to."""
        leaves = tree_leaves(list(values))
        self._protected |= {_memory(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.numel()}

    def is_constant(self, value: Any) -> bool:
        """Tell whether ``value`` is a tensor that does not depend on the samples."""
        return isinstance(value, Tensor) and value not in self._stand_ins

    def tape(self, found: Any) -> Tape | None:
        """The tape of the forward with the output ``found``; None if it cannot be used."""
        if not (self._usable and all(map(is_plain, tree_leaves(found)))):
            return None
        self._tape.output = self._replaced(found)
        needed = _stand_ins_in(self._tape.output)
        for _, args, kwargs, results, finished in reversed(self._tape.calls):
            finished |= _stand_ins_in((args, kwargs, results)) - needed
            needed |= finished
        return self._tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self._usable = self._usable and self._note(func, args, kwargs or {}, found)
        return found

    def _note(self, operator: Any, args: Any, kwargs: Any, found: Any) -> bool:
        """Record an operation if it depends on the samples, and tell whether the recording is still of use."""
        if draws_random_numbers(operator, args, kwargs) or operator.namespace not in _KNOWN_OPERATORS:
            return False
        inputs, results = tree_leaves((args, kwargs)), tree_leaves(found)
        tensors = [each for each in inputs if isinstance(each, Tensor)]
        constants = list(filter(self.is_constant, tensors))
        depends = len(constants) < len(tensors)
        for each in filter(is_plain_tensor, tree_leaves(written_arguments(operator, args, kwargs))):
            # A constant that is overwritten with what depends on the samples would be another one the next time.
            if _memory(each) in self._protected or (depends and any(each is constant for constant in constants)):
                return False
        if not depends:
            return True
        if not all(map(is_plain, (*inputs, *results))):
            return False
        self.protect(constants)
        self._tape.constants += constants
        made = [self._stand_in(each) if isinstance(each, Tensor) else each for each in results]
        self._tape.calls.append((operator, self._replaced(args), self._replaced(kwargs), made, set()))
        return True

    def _stand_in(self, tensor: Tensor) -> Tensor:
        """The stand-in of ``tensor``; the result of an operation in place is an argument that has one already."""
        if tensor not in self._stand_ins:
            self._stand_ins[tensor] = torch.empty(tensor.shape, device="meta")
        return self._stand_ins[tensor]

    def _replaced(self, values: Any) -> Any:
        return tree_map(lambda leaf: self._stand_ins.get(leaf, leaf) if isinstance(leaf, Tensor) else leaf, values)


def _stand_ins_in(values: Any) -> set[int]:
    return {id(leaf) for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_meta}


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _copy(value: Any) -> Any:
    """Copy a tensor, because whoever gets an output may change it."""
    return value.clone() if isinstance(value, Tensor) else value
