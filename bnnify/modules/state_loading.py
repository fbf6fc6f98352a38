"""Updates after torch has loaded a state_dict into a Bayesian module."""

__all__ = ["freeze_prior_means", "update_derived"]

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..distributions.gaussian import has_pruned
from ..draws.companions import INITIAL_STD, PRIOR_MEAN, RHO, PriorMean
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
    return [key for key in missing if key not in derived]


def freeze_prior_means(module: nn.Module) -> None:
    """Make frozen means of priors of the parameters that ``load_state_dict(assign=True)`` has put in their places."""
    for attribute in slots_of(module):
        prior_mean = module._parameters.get(attribute + PRIOR_MEAN)
        if type(prior_mean) is nn.Parameter:
            module._parameters[attribute + PRIOR_MEAN] = PriorMean(prior_mean)
