"""The mean squares of gradients in the state of Adam, by the names of the parameters in a model."""

__all__ = ["mean_squares"]

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..distributions.gaussian import at_least_float32
from ..errors import ArgumentError


def mean_squares(model: nn.Module, optimizer: torch.optim.Optimizer | Mapping[str, Any]) -> dict[str, Tensor]:
    """``exp_avg_sq / (1 - β₂^t)``: the mean square of each parameter's batch gradients, if Adam has made a step.

    The division undoes that Adam's average started from zero.

    Raises:
        ArgumentError: The state is not that of Adam, or not of this model.
    """
    squares = {}
    for name, (state, group) in _states(model, optimizer).items():
        if "exp_avg_sq" not in state or "betas" not in group:
            raise ArgumentError(
                f"The optimizer's state of `{name}` is not that of Adam: it holds {', '.join(state) or 'nothing'}, and "
                "not exp_avg_sq under betas. Use FisherStd.estimate."
            )
        shape, expected = state["exp_avg_sq"].shape, model.get_parameter(name).shape
        if shape != expected:
            raise ArgumentError(
                f"The optimizer's state is that of another model, or in another order: for `{name}`, of shape "
                f"{tuple(expected)}, it has one of shape {tuple(shape)}."
            )
        steps = state.get("step", group.get("step", 0))  # fused optimizers of other libraries count by group
        forgotten = float(group["betas"][1]) ** float(steps)
        if not forgotten < 1:
            raise ArgumentError(f"Adam has not made a step with `{name}` yet.")
        squares[name] = at_least_float32(state["exp_avg_sq"].detach()) / (1 - forgotten)
    if not squares:
        raise ArgumentError("The optimizer has no state: it has not made a step, or it is not Adam.")
    return squares


_States = dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]]


def _states(model: nn.Module, optimizer: torch.optim.Optimizer | Mapping[str, Any]) -> _States:
    """Find the state of each parameter that has one, with its group."""
    if isinstance(optimizer, torch.optim.Optimizer):
        named = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = {p: group for group in optimizer.param_groups for p in group["params"] if id(p) in named}
        if not groups:
            raise ArgumentError(
                "The optimizer holds none of the model's parameters. Was the model copied after the optimizer was made?"
            )
        return {named[id(p)]: (optimizer.state[p], group) for p, group in groups.items() if p in optimizer.state}
    if not (isinstance(optimizer, Mapping) and {"state", "param_groups"} <= optimizer.keys()):
        raise ArgumentError(
            "FisherStd.from_adam takes an optimizer or its state_dict, which has `state` and `param_groups`, not "
            f"{type(optimizer).__name__}. Many checkpoints keep it under a key such as 'optimizer'."
        )
    states = optimizer["state"]
    numbers = {number: group for group in optimizer["param_groups"] for number in group["params"]}
    names = _names(model, optimizer["param_groups"], len(numbers))
    return {name: (states[n], group) for name, (n, group) in zip(names, numbers.items(), strict=True) if n in states}


def _names(model: nn.Module, groups: list[Mapping[str, Any]], count: int) -> list[str]:
    """Name the parameters of a state_dict, which numbers them, in its order."""
    named = dict(model.named_parameters())
    if all("param_names" in group for group in groups):
        names = [name for group in groups for name in group["param_names"]]
        if unknown := [name for name in names if name not in named]:
            raise ArgumentError(f"The optimizer's state is that of another model: it names `{unknown[0]}`.")
        return names
    if len(groups) > 1:
        raise ArgumentError(
            f"The state_dict has {len(groups)} groups of parameters and no names in them: nobody can tell which is "
            "which. Make the optimizer as for the training, load the state_dict into it, and pass that."
        )
    trainable = [name for name, parameter in named.items() if parameter.requires_grad]
    for names in (list(named), trainable):
        if len(names) == count:
            return names
    raise ArgumentError(
        f"The optimizer's state is that of another model: it has {count} parameters, and the model {len(named)}, of "
        f"which {len(trainable)} have requires_grad."
    )
