"""The posterior with which a parameter starts, or which it has already."""

__all__ = ["Wanted", "posterior_there", "settings_there", "start"]

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..distributions.gaussian import rho_from_std, rms_std
from ..distributions.initial_std import Constant, as_posterior_std, fan_in_scale
from ..distributions.prior import Posterior, as_prior
from ..draws.companions import PriorMean, as_buffer, from_buffer
from ..draws.estimators import POINT
from .becoming import NewPosterior
from .computed_weights import layer_weight
from .parameters import BayesianParameter, Settings, settings_of
from .refusals import refuse_parameter
from .registry import units_dim
from .selection import Holder


class Wanted(NamedTuple):
    """What a parameter that is not Bayesian yet shall get."""

    prior: object
    posterior_std: object
    estimator: str
    instead: str
    """Which estimator was asked for instead, and why the layer cannot have it; empty if it has it."""


def settings_there(places: Sequence[Holder]) -> Settings | None:
    """How a parameter is Bayesian already, in any of its places."""
    found = (settings_of(place.module).get(place.attribute) for place in places)
    return next((settings for settings in found if settings is not None), None)


def posterior_there(places: Sequence[Holder]) -> NewPosterior | None:
    """The posterior that a parameter has already, in any of its places."""
    for place in places:
        if place.attribute in settings_of(place.module):
            there = BayesianParameter(place.names[0], place.module, place.attribute)
            return NewPosterior(there.settings, there.rho, there.prior_mean, there.initial_std)  # type: ignore[arg-type]
    return None


def start(parameter: Tensor, places: Sequence[Holder], wanted: Wanted) -> tuple[NewPosterior, str]:
    """The posterior with which ``parameter`` starts, and what was asked for in words; nothing is changed."""
    for place in places:
        refuse_parameter(place.module_names[0], place.module, place.attribute, parameter)
    rule: Any = as_posterior_std(wanted.posterior_std)
    prior, layer = as_prior(wanted.prior), places[0].layer
    scale, dim = fan_in_scale(layer_weight(layer, parameter)), units_dim(layer, parameter)
    settings = Settings(prior, rule, wanted.estimator, scale=scale, units_dim=dim, instead=wanted.instead)
    asked, start = str(settings), None
    if hasattr(rule, "of"):  # a NamedPosteriorStd, of which asking `isinstance` takes long
        names = [name for place in places for name in place.names]
        start = rho_from_std(rule.of(names, parameter.detach(), scale, dim).to(parameter.dtype)).contiguous()
        # Of σ, all that settings and files keep is its size.
        settings.posterior_std = Constant(rms_std(start).item())
    rho = settings.initial_rho(places[0].names[0], parameter)
    initial_std = as_buffer(rms_std(rho)) if prior.needs_initial_std else None
    rho = rho.expand_as(parameter).contiguous() if start is None else start
    prior_mean = PriorMean(parameter.detach().clone()) if prior.centred else None
    if wanted.estimator == POINT:
        scale_of_prior = None if initial_std is None else from_buffer(initial_std)
        prior.penalty(Posterior(parameter, None, prior_mean, scale_of_prior))  # which may refuse
        return NewPosterior(settings, None, prior_mean, initial_std), str(settings)
    return NewPosterior(settings, nn.Parameter(rho), prior_mean, initial_std), asked
