"""What torch does not do when it loads a state_dict into a Bayesian module: keep ties, and update what is derived."""

__all__ = ["freeze_prior_means", "keep_ties", "update_derived"]

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ..distributions.gaussian import at_least_float32, has_pruned
from ..draws.companions import INITIAL_STD, OF_PRIOR, PRIOR_MEAN, RHO, PriorMean
from .parameters import BayesianParameter
from .settings import slots_of


def update_derived(
    module: nn.Module, state_dict: Mapping[str, Any], prefix: str, missing: list[str], assign: bool
) -> list[str]:
    """Update what is derived from the loaded tensors; return those of the ``missing`` keys that are not derived.

    State dicts of version 0.1 have no scale of the prior: it follows the prior's mean.
    """
    derived = set()
    for name, slot in slots_of(module).items():
        parameter = BayesianParameter(prefix + name, module, name)
        if prefix + name + PRIOR_MEAN in state_dict and prefix + name + INITIAL_STD not in state_dict:
            parameter.refresh_initial_std(assign)
            derived.add(prefix + name + INITIAL_STD)
        if parameter.has_rho and prefix + name + RHO in state_dict:
            slot.state.has_pruned = has_pruned(parameter.rho)
            parameter.rho.data = at_least_float32(parameter.rho.data)  # an old file may have half precision
    return [key for key in missing if key not in derived]


def freeze_prior_means(module: nn.Module) -> None:
    """Make frozen tensors of priors of the parameters that ``load_state_dict(assign=True)`` has put in their places."""
    for name in (attribute + ending for attribute in slots_of(module) for ending in OF_PRIOR):
        loaded = module._parameters.get(name)
        if type(loaded) is nn.Parameter:
            module._parameters[name] = PriorMean(loaded)


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
