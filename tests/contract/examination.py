"""All promises asked of one model."""

__all__ = ["Outcome", "broken", "drawn_network", "examine"]

import time
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

import bnnify
from bnnify.modules.parameters import bayesian_parameters

from .case import Case, Subject
from .comparisons import NotApplicable, described
from .promises import CHECKS


@dataclass(frozen=True)
class Outcome:
    """How one check went.

    Attributes:
        check: Its name, a key of ``CHECKS``, or ``"original"`` where the original model already fails.
        status: ``"pass"``, ``"fail"`` or ``"n/a"``.
        detail: What was found, or why the check does not apply.
        seconds: How long it took.
    """

    check: str
    status: str
    detail: str
    seconds: float


# What takes a second conversion or hooks comes early, and what leaves the modules in train at the end.
_FIRST, _LAST = ("σ → 0", "converts", "hooks", "state_dict"), ("draw in train", "gradients")
_ORDER = (*_FIRST, *(name for name in CHECKS if name not in _FIRST + _LAST), *_LAST)


def examine(case: Case) -> Iterator[Outcome]:
    """Run every check on one model; yields each outcome as it is known."""
    start = time.perf_counter()
    try:
        subject = Subject(case)
    except Exception as error:
        yield Outcome("original", "fail", described(error), time.perf_counter() - start)
        return
    yield Outcome(
        "original",
        "pass",
        f"{sum(p.numel() for p in subject.plain.parameters()):,} weights",
        time.perf_counter() - start,
    )
    for name in ("converts",) if case.refuses else _ORDER:
        start = time.perf_counter()
        try:
            status, detail = "pass", CHECKS[name](subject) or ""
        except NotApplicable as reason:
            status, detail = "n/a", str(reason)
        except Exception as error:
            status, detail = "fail", described(error)
        yield Outcome(name, status, detail, time.perf_counter() - start)
        if name == "converts" and status == "fail":
            return


def broken(case: Case) -> dict[str, str]:
    """What one model breaks of the promises, and how; nothing may."""
    return {outcome.check: outcome.detail for outcome in examine(case) if outcome.status == "fail"}


def drawn_network(bnn: bnnify.BayesianModel) -> nn.Module:
    """The plain model whose parameters are the samples of the draw in effect."""
    plain = bnnify.collapse(bnn)
    for parameter in bayesian_parameters(bnn.module):
        holder, _, attribute = parameter.name.rpartition(".")
        plain.get_submodule(holder)._parameters[attribute].data.copy_(getattr(parameter.module, attribute))
    return plain
