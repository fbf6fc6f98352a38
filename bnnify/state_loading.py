"""What follows when torch has loaded a state_dict into a Bayesian module."""

__all__ = ["follow", "keep_ties"]

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .companions import INITIAL_STD, PRIOR_MEAN, RHO, PriorMean
from .parameters import BayesianParameter, settings_of
from .posterior import has_pruned


def follow(
    module: nn.Module, state_dict: Mapping[str, Any], prefix: str, missing: list[str], assign: bool
) -> list[str]:
    """Let what is derived from the loaded tensors follow them; returns those of the ``missing`` keys that really are.

    State dicts of version 0.1 have no scale of the prior: it follows the prior's mean.
    """
    derived = set()
    for name, settings in settings_of(module).items():
        parameter = BayesianParameter(prefix + name, module, name)
        if prefix + name + PRIOR_MEAN in state_dict and prefix + name + INITIAL_STD not in state_dict:
            parameter.refresh_initial_std(assign)
            derived.add(prefix + name + INITIAL_STD)
        if prefix + name + RHO in state_dict:
            settings.pruned = has_pruned(parameter.rho)
    return [key for key in missing if key not in derived]


def keep_ties(module: nn.Module, before: Mapping[str, Tensor | None], load: list[str]) -> None:
    """Where ``load_state_dict(assign=True)`` has replaced a parameter, let what was tied to it get the same one.

    Args:
        module: The module.
        before: Its parameters before it was loaded.
        load: The list of missing keys, which tells one ``load_state_dict`` from another.
    """
    for attribute in settings_of(module):
        for name in (attribute, attribute + RHO, attribute + PRIOR_MEAN):
            replaced, now = before.get(name), module._parameters.get(name)
            if replaced is None or now is None or now is replaced:
                continue
            if name.endswith(PRIOR_MEAN) and type(now) is nn.Parameter:
                now = PriorMean(now)
            noted: Any = getattr(replaced, "_replaced_by", None)
            if noted is None or noted[0] is not load:
                noted = replaced._replaced_by = load, now  # type: ignore[attr-defined]
            module._parameters[name] = noted[1]
