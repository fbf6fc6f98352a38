"""The posterior with which a parameter starts."""

__all__ = ["initial_posterior", "leaves_room", "measure_rules", "untrained_layer"]

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..distributions.gaussian import rms_std
from ..distributions.initial_std import Constant, MeasuredStd, Relative, as_posterior_std, fan_in_scale
from ..distributions.prior import Prior, as_prior
from ..distributions.untrained import looks_untrained
from ..draws.companions import PriorMean, as_buffer
from ..errors import ConversionError
from .class_change import NewPosterior
from .computed_weights import layer_weight
from .holders import Holder
from .parameters import BayesianParameter
from .posterior import as_posterior
from .refusals import refuse_parameter
from .registry import units_dim
from .settings import Settings

_UNTRAINED = 10.0
"""How wide a prior is if the weights are not trained yet, as a multiple of the rms of each tensor."""


def initial_posterior(
    parameter: Tensor,
    places: Sequence[Holder],
    wanted: Settings,
    untrained: bool = False,
    share: bool = False,
) -> tuple[NewPosterior, str]:
    """Make the posterior with which ``parameter`` starts, and describe what was asked for; nothing is changed.

    Args:
        parameter: A parameter that is not Bayesian yet.
        places: Every place that holds it.
        wanted: Its settings as a user gave them, unchecked and without what follows from its layer.
        untrained: Let a prior that goes by σ leave the weights room to move. Default: ``False``.
        share: Let the prior mean be the memory of the weight itself, and one σ for all weights one number, expanded.
            Default: ``False``.

    Raises:
        ConversionError: It cannot have a posterior, or not with these settings.
    """
    posterior, prior = as_posterior(wanted.posterior), as_prior(wanted.prior)
    for place in places:
        refuse_parameter(place.module_names[0], place.module, place.attribute, parameter, posterior.companions)
    posterior.check_prior(prior)
    rule: Any = as_posterior_std(wanted.posterior_std)
    layer = places[0].layer
    scale, dim = fan_in_scale(layer_weight(layer, parameter)), units_dim(layer, parameter)
    settings = replace(wanted, prior=prior.kept, posterior_std=rule, scale=scale, units_dim=dim)
    asked, std = str(settings), None
    if hasattr(rule, "of"):  # a NamedPosteriorStd, of which asking `isinstance` takes long
        names = [name for place in places for name in place.names]
        std = rule.of(names, parameter.detach(), scale, dim)
        if std.is_meta:
            raise ConversionError(
                f"Cannot convert `{names[0]}` on the meta device: {type(rule).__name__} needs the values of the "
                "weights. Convert after they are loaded, or give another posterior_std, such as a number."
            )
        # Of σ, all that settings and files keep is its size.
        settings = replace(settings, posterior_std=Constant(rms_std(std, parameter.dtype).item()))
    first = settings.initial_std(places[0].names[0], parameter)
    initial_std = None
    if prior.needs_initial_std:
        known = rms_std(first, parameter.dtype)
        if untrained:
            known = _with_room(prior, parameter.detach(), scale).maximum(known).to(known.dtype)
        initial_std = as_buffer(known)
    companions = posterior.start(parameter.detach(), first if std is None else std)
    mean = parameter.detach()
    of_prior: dict[str, nn.Parameter] = {
        f"_{name}": PriorMean(value if share and value is mean else value.clone())
        for name, value in prior.beside(mean).items()
    }
    beside = {ending: nn.Parameter(value if share else value.contiguous()) for ending, value in companions.items()}
    return NewPosterior(settings, beside, of_prior, initial_std), asked


def leaves_room(parameter: BayesianParameter) -> bool:
    """Tell whether the prior is wide because the model looked untrained, as its scale and its mean still say.

    A prior that went by σ comes nowhere near: no σ is tuned to more than the size of the weights.
    """
    if parameter.initial_std is None:
        return False
    settings, weights = parameter.settings, parameter.prior_centre
    room = as_buffer(rms_std(_with_room(settings.prior, weights, settings.scale), weights.dtype)).float()
    # In half precision and in int8 both are rounded.
    is_wide = torch.isclose(parameter.initial_std.float(), room, rtol=0.1)
    return bool(is_wide) and bool(room > parameter.initial_std_by_rule().float())


def _with_room(prior: Prior, weights: Tensor, scale: float) -> Tensor:
    return Relative(_UNTRAINED / prior.relative_std)(weights, scale)


def measure_rules(
    model: nn.Module, rules: dict[Tensor, Any], holders: Mapping[Tensor, Sequence[Holder]]
) -> list[MeasuredStd]:
    """Put in the place of each rule that runs the model what it has found; return those rules, each once."""
    found: dict[int, MeasuredStd] = {id(rule): rule for rule in rules.values() if isinstance(rule, MeasuredStd)}
    for rule in found.values():
        parameters = [parameter for parameter, other in rules.items() if other is rule]
        names = [name for parameter in parameters for place in holders[parameter] for name in place.names]
        rules.update(dict.fromkeys(parameters, rule.measure(model, names)))
    return list(found.values())


def untrained_layer(
    holders: Mapping[Tensor, Sequence[Holder]], wanted: Container[Tensor], unasked: Container[Tensor]
) -> str:
    """Name the last of the layers that become Bayesian if its weight looks untrained and nobody asked for its prior.

    It is the last one that tells: a network from scratch has never seen a target, nor has one with a new head, whose
    other layers are trained, but for something else. Where it is too small to tell, the one before it has to. The name
    is empty if it looks trained.
    """
    for parameter in reversed([parameter for parameter in holders if parameter in wanted]):
        place = holders[parameter][0]
        weight, bias = layer_weight(place.layer, parameter), place.layer._parameters.get("bias")
        untrained = looks_untrained(weight, bias)
        if untrained is not None:
            name = place.layer_names[0] or type(place.layer).__name__
            return name if untrained and parameter in unasked else ""
    return ""
