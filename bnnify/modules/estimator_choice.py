"""The choice of estimators: the one that was asked for, or the weight sample where a layer cannot have that."""

__all__ = ["fit_estimators"]

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from ..draws.estimators import DEFAULT, ESTIMATORS
from ..errors import ConversionError
from .holders import Holder
from .known_forwards import known_forward
from .mean_field import MeanField
from .posterior import as_posterior
from .selection import UNSET, Setting, resolve
from .settings import Settings, plain_class, slots_of


def fit_estimators(
    settings: Mapping[Tensor, Settings], holders: Mapping[Tensor, Sequence[Holder]], given: Setting[str] = UNSET
) -> dict[Tensor, Settings]:
    """Choose the estimator of each parameter; with it comes the reason, if it is not the one that was asked for.

    Args:
        settings: The settings that were asked for, of the parameters that are to be Bayesian.
        holders: Every place that holds a parameter, of these and of others.
        given: The option from which the estimators come, in which no glob may be useless. Default: none was given.

    Raises:
        ConversionError: An estimator is unknown, or a glob names it for nothing but what cannot have it.
    """
    chosen = {parameter: holders[parameter] for parameter in settings}
    for parameter, wanted in settings.items():
        estimator, posterior = wanted.estimator, wanted.posterior
        if not isinstance(estimator, str) or estimator not in ESTIMATORS:
            hint = " A point is a posterior: posterior=bnnify.Point()." if estimator == "point" else ""
            raise ConversionError(
                f"Unknown estimator {estimator!r}: known are {', '.join(map(repr, ESTIMATORS))}.{hint}"
            )
        if ESTIMATORS[estimator] is not None and not isinstance(as_posterior(posterior), MeanField):
            raise ConversionError(
                f"Cannot use estimator={estimator!r} for `{chosen[parameter][0].names[0]}`, which has "
                f"posterior={posterior}: it is for MeanField() alone. Give it {DEFAULT!r}."
            )
    asked = {parameter: wanted.estimator for parameter, wanted in settings.items()}
    why_not = {parameter: _why_not(parameter, asked, chosen) for parameter in chosen}
    if isinstance(given, Mapping):
        _refuse_useless(given, why_not, chosen)
    return {
        parameter: replace(settings[parameter], estimator=DEFAULT, fallback_reason=f"{asked[parameter]}: {reason}")
        if reason
        else replace(settings[parameter], fallback_reason="")
        for parameter, reason in why_not.items()
    }


def _refuse_useless(
    given: Mapping[str, str], why_not: Mapping[Tensor, str], chosen: Mapping[Tensor, Sequence[Holder]]
) -> None:
    deciding: dict[Tensor, str] = resolve("estimator", {pattern: pattern for pattern in given}, chosen)
    decided: dict[str, list[Tensor]] = {}
    for parameter, pattern in deciding.items():
        decided.setdefault(pattern, []).append(parameter)
    for pattern, parameters in decided.items():
        if all(why_not[parameter] for parameter in parameters):
            place = chosen[parameters[0]][0]
            raise ConversionError(
                f"Cannot use estimator={{{pattern!r}: {given[pattern]!r}}} for `{place.names[0]}` "
                f"({type(place.module).__name__}): {why_not[parameters[0]]}. Take it out of the pattern, or give it "
                f"{DEFAULT!r}."
            )


def _why_not(parameter: Tensor, asked: Mapping[Tensor, str], chosen: Mapping[Tensor, Sequence[Holder]]) -> str:
    """Say why ``parameter`` cannot have the estimator that was asked for; empty if it can."""
    place, *ties = chosen[parameter]
    if ESTIMATORS[asked[parameter]] is None:
        return ""
    own = slots_of(place.module).get(place.attribute)
    if own is not None and own.settings.estimator == asked[parameter]:
        return ""  # it has it already
    if ties:
        return "it is tied to another parameter, and both must have the same value"
    if len(place.module_names) > 1:
        return "its layer has several names, and must have the same weights wherever it is called"
    cls = plain_class(place.module)
    if known_forward(cls) is None or "forward" in vars(place.module):
        return f"only Linear and (transposed) convolutions with torch's own forward can have it, not {cls.__name__}"
    if place.attribute == "weight":
        return ""
    weight = place.module._parameters.get("weight") if place.attribute == "bias" else None
    if weight is None or weight not in chosen or asked[weight] != asked[parameter]:
        return "only a layer whose `weight` has it too can have it"
    return _why_not(weight, asked, chosen)
