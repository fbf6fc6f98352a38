"""What a model computes before and beside its Bayesian weights: done once per batch, and not again for each sample.

The first forward of a batch is recorded. In it every sample is a :class:`~bnnify.recorder.Drawn` tensor, and so is
whatever an operation makes of one. For the next samples the operations on these are run again, and Python is not.

That this is what the forward would do rests on one fact: nothing but the recorder can read the numbers in a drawn
tensor. What is not drawn therefore cannot depend on the sample; and of what operations tell Python about one, which is
shapes and single numbers (``item()``), the next sample must give the same. Everything else that could make the next
forward differ from the first (random numbers, attributes and tensors that it changes) is looked for. Where it is found,
forwards are run as usual. Two things are not seen: what a model keeps outside of itself, in the globals of Python, and
what it writes to the ``data`` of a parameter.
"""

__all__ = ["Trunk"]

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .draw import Draw
from .recorder import Drawn, Recorder
from .repeatable import RandomStates, Surroundings, runs_unobserved
from .sampler import Sampler
from .tape import Tape, Unsafe


class Trunk:
    """Runs the first forward of each batch, and records what the others have to do.

    Args:
        module: The model.
        sampler: What draws its networks.
    """

    def __init__(self, module: nn.Module, sampler: Sampler) -> None:
        self._module = module
        self._sampler = sampler
        self._on = runs_unobserved(module)
        self._weights = _deterministic_weights(module, sampler) if self._on else set()
        self._on = bool(self._weights)
        self._model: Surroundings | None = None

    def forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Tape | None]:
        """The output for the sampler's last network, which is in effect, and what gives it for the next networks."""
        if self._on:
            luck = RandomStates(self._sampler.devices)
            try:
                return self._recorded(args, kwargs, luck)
            except Exception:  # of which there are as many as ways to look at a tensor; a real one will come again
                self._on = False
                luck.restore()
        return self._module(*args, **kwargs), None

    def _recorded(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], luck: RandomStates
    ) -> tuple[Any, Tape | None]:
        given, recorder = Surroundings(args, kwargs), Recorder()
        self._model = self._model or Surroundings(self._module)
        drawn = {mean: recorder.drawn(sample) for mean, sample in self._sampler.samples.items()}
        try:
            with Draw(self._sampler.parameters, lambda parameter: drawn[id(parameter.mean)]):
                output = self._module(*args, **kwargs)
        finally:
            recorder.ended = True
        leaves, structure = pytree.tree_flatten(output)
        for leaf in leaves:
            if isinstance(leaf, Tensor) and not isinstance(leaf, Drawn):
                recorder.use(leaf)
            elif not isinstance(leaf, _LEAVES):
                raise Unsafe  # it may hold a drawn tensor
        used = {tensor.untyped_storage()._cdata for tensor, _ in recorder.used}
        # Where every weight is needed again, there is no trunk.
        self._on = recorder.safe and not self._weights <= used
        self._on = self._on and luck.are_unchanged() and given.are_unchanged() and self._model.are_unchanged()
        values = [leaf.drawn_value if isinstance(leaf, Drawn) else leaf for leaf in leaves]
        found = pytree.tree_unflatten(values, structure)
        if not self._on:
            return found, None
        slots = [leaf.slot if isinstance(leaf, Drawn) else leaf for leaf in leaves]
        sampled = {mean: stand_in.slot.number for mean, stand_in in drawn.items()}
        return found, Tape(recorder.operations, recorder.used, sampled, slots, structure)


_LEAVES = (Tensor, type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def _deterministic_weights(module: nn.Module, sampler: Sampler) -> set[int]:
    """The memory of the matrices and kernels that no draw replaces."""
    noisy = set()
    for parameter in sampler.parameters:
        derived = (
            [parameter.prior_mean] if parameter.is_point else [parameter.prior_mean, parameter.mean, parameter.rho]
        )
        noisy |= set(map(id, derived))
    weights = [p for p in module.parameters() if p.ndim > 1 and id(p) not in noisy]
    return {weight.untyped_storage()._cdata for weight in weights}
