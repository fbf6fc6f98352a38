"""Turn the settings of Bayesian parameters into the plain data that stand in a file, and back."""

__all__ = ["can_be_saved", "initial_std_from_data", "settings_as_data", "settings_from_data"]

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..draws.estimators import DEFAULT, ESTIMATORS
from ..errors import CheckpointError
from ..modules.point import Point
from ..modules.settings import Settings
from .kinds import KINDS


def settings_as_data(settings: Mapping[str, Settings]) -> dict[str, Any]:
    """Return the settings of parameters, by name, as they stand in a file; equal ones are one object, written once."""
    first: dict[str, dict[str, Any]] = {}
    found = {}
    for name, each in settings.items():
        data: dict[str, Any] = {"estimator": each.estimator}
        for field in ("prior", "posterior_std", "posterior"):
            value = getattr(each, field)
            data[field] = {"kind": type(value).__name__, **dataclasses.asdict(value)}
        found[name] = first.setdefault(repr(data), data)
    return found


def can_be_saved(what: object) -> bool:
    """Tell whether a prior, a rule for σ or a posterior is one that a file may name."""
    return KINDS.get(type(what).__name__) is type(what)


def settings_from_data(data: Mapping[str, Any]) -> Settings:
    """Return the settings of one parameter, of which :func:`settings_as_data` made the data.

    Raises:
        CheckpointError, KeyError, TypeError, ValueError: The data are damaged.
    """
    estimator = data["estimator"]
    posterior = _from_data(data.get("posterior", {"kind": "MeanField"}))  # files up to format 3 have none
    if estimator == "point":  # nor a word of their own for this
        estimator, posterior = DEFAULT, Point()
    if estimator not in ESTIMATORS:
        raise CheckpointError(f"unknown estimator {estimator!r}")
    return Settings(_from_data(data["prior"]), _from_data(data["posterior_std"]), estimator, posterior)


def _from_data(data: Mapping[str, Any]) -> Any:
    arguments = dict(data)
    return KINDS[arguments.pop("kind")](**arguments)


def initial_std_from_data(data: Mapping[str, Any]) -> Tensor | None:
    """Return the rms of the σ that a posterior started with, where files up to format 2 have it; None in newer ones."""
    known = float(data.get("initial_std", math.nan))
    return torch.tensor([known], device="cpu") if math.isfinite(known) else None
