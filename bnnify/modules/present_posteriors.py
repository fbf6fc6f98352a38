"""The posteriors that parameters have already, and options that would have to change them."""

__all__ = ["present_posterior", "refuse_changes"]

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..errors import ConversionError
from ..report import Reason
from .class_change import NewPosterior
from .holders import Holder
from .parameters import BayesianParameter
from .selection import WhyNot
from .settings import Settings, plain_class, slots_of


def present_posterior(places: Sequence[Holder]) -> NewPosterior | None:
    """Find the posterior that a parameter has already, in any of its places; None if it is not Bayesian."""
    for place in places:
        slot = slots_of(place.module).get(place.attribute)
        if slot is not None:
            there: Any = BayesianParameter(place.names[0], place.module, place.attribute)
            return NewPosterior(slot.settings, there.companions, there.of_prior, there.initial_std, slot.state)
    return None


def refuse_changes(
    already: Mapping[Tensor, Settings],
    holders: Mapping[Tensor, Sequence[Holder]],
    why_not: Mapping[Tensor, WhyNot | None],
    found: Mapping[str, Mapping[Tensor, Any]],
    fitted: Mapping[Tensor, Settings],
) -> None:
    """Refuse an option that would change the posterior of a parameter that is Bayesian already.

    Raises:
        ConversionError: Names the option, the parameter, and what to do.
    """
    for parameter, own in already.items():
        reason, place = why_not[parameter], holders[parameter][0]
        has = ""
        if reason is not None and reason.reason is Reason.EXCLUDED:
            option, has = "exclude", "a posterior"
        elif parameter in found["prior"] and _differ(found["prior"][parameter], own.prior):
            option, has = "prior", f"prior={own.prior}"
        elif parameter in found["posterior_std"]:
            option, has = "posterior_std", "a σ, which has had its start"
        elif parameter in found["posterior"] and _differ(found["posterior"][parameter], own.posterior):
            option, has = "posterior", f"posterior={own.posterior}"
        elif parameter in found["estimator"] and fitted[parameter].estimator != own.estimator:
            option, has = "estimator", f"estimator={own.estimator!r}"
        if has:
            cls = plain_class(place.module).__name__
            raise ConversionError(
                f"Cannot follow {option}= for `{place.names[0]}` ({cls}): it is Bayesian "
                f"already and has {has}. Give the option for what is new alone (with `select`, or as a mapping from "
                "globs), or call bnnify.collapse first and convert again."
            )


def _differ(given: object, own: object) -> bool:
    """Compare two priors or posteriors by their repr: those of a user may hold tensors, which ``==`` cannot compare."""
    return given is not own and (type(given) is not type(own) or repr(given) != repr(own))
