"""The report of a conversion, and its errors where nothing, or too little, is converted."""

__all__ = ["conversion_report", "nothing_to_convert", "refuse_unsupported"]

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ..errors import ConversionError
from ..report import ConversionReport, Reason, ReportEntry
from .class_change import NewPosterior
from .holders import Holder
from .selection import WhyNot
from .settings import plain_class


def conversion_report(
    holders: Mapping[Tensor, Sequence[Holder]],
    why_not: Mapping[Tensor, WhyNot | None],
    posteriors: Mapping[Tensor, NewPosterior],
    descriptions: Mapping[Tensor, str],
    untrained: str = "",
) -> ConversionReport:
    """Report for each parameter whether it is Bayesian, and why not."""
    entries = []
    for parameter, places in holders.items():
        new, reason = posteriors.get(parameter), why_not[parameter]
        reason = reason if new is None else None
        added = [] if new is None else [*new.companions.values(), *new.of_prior.values()]
        entries.append(
            ReportEntry(
                name=places[0].names[0],
                module=plain_class(places[0].module).__name__,
                shape=tuple(parameter.shape),
                bayesian=new is not None,
                reason=reason.sentence if reason else "",
                settings=descriptions.get(parameter, ""),
                memory=parameter.nbytes,
                added_memory=sum(tensor.nbytes for tensor in added),
                unsupported=reason is not None and reason.reason in (Reason.UNKNOWN_LAYER, Reason.UNSUPPORTED),
            )
        )
    return ConversionReport(tuple(entries), untrained)


def refuse_unsupported(report: ConversionReport) -> None:
    """Refuse a conversion that leaves a parameter alone for lack of support.

    Raises:
        ConversionError: Names the first ones, with their reasons.
    """
    if unsupported := [entry for entry in report.left_alone if entry.unsupported]:
        listing = "; ".join(f"`{entry.name}` ({entry.module}): {entry.reason}" for entry in unsupported[:3])
        more = f"; and {len(unsupported) - 3} more" if len(unsupported) > 3 else ""
        raise ConversionError(
            f"strict=True, but these parameters were left alone: {listing}{more}. What is meant to stay as it is, name "
            "in `exclude`."
        )


def nothing_to_convert(model: nn.Module, why_not: Mapping[Tensor, WhyNot | None]) -> str:
    """Explain in a sentence why nothing of ``model`` can be converted."""
    found = f"Nothing to convert in the model ({type(model).__name__}): "
    if not why_not:
        return found + "it has no parameters."
    reasons = [reason for reason in why_not.values() if reason]
    if any(reason.reason is Reason.FROZEN for reason in reasons):
        return found + "every layer that could be converted is frozen. Set requires_grad, or select parameters by name."
    sentences = list(dict.fromkeys(reason.sentence for reason in reasons))
    listing = "; ".join([*sentences[:3], *(["…"] if len(sentences) > 3 else [])])
    return found + f"its {len(why_not)} parameters were left alone ({listing}). Name what to convert with `select`."
