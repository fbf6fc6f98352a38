"""What follows when torch has loaded a state_dict into a Bayesian module."""

__all__ = ["follow", "freeze_prior_means"]

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..distributions.gaussian import has_pruned
from ..draws.companions import INITIAL_STD, PRIOR_MEAN, RHO, PriorMean
from .parameters import BayesianParameter
from .settings import slots_of


def follow(
    module: nn.Module, state_dict: Mapping[str, Any], prefix: str, missing: list[str], assign: bool
) -> list[str]:
    """Let what is derived from the loaded tensors follow them; returns those of the ``missing`` keys that really are.

    State dicts of version 0.1 have no scale of the prior: it follows the prior's mean.
    """
    derived = set()
    for name, slot in slots_of(module).items():
        parameter = BayesianParameter(prefix + name, module, name)
        if prefix + name + PRIOR_MEAN in state_dict and prefix + name + INITIAL_STD not in state_dict:
            parameter.refresh_initial_std(assign)
            derived.add(prefix + name + INITIAL_STD)
        if prefix + name + RHO in state_dict:
            slot.state.has_pruned = has_pruned(parameter.rho)
    return [key for key in missing if key not in derived]


def freeze_prior_means(module: nn.Module) -> None:
    """Let the means of priors stay what nothing trains, where ``load_state_dict(assign=True)`` has put parameters."""
    for attribute in slots_of(module):
        prior_mean = module._parameters.get(attribute + PRIOR_MEAN)
        if type(prior_mean) is nn.Parameter:
            module._parameters[attribute + PRIOR_MEAN] = PriorMean(prior_mean)
