"""What is decided from a prediction, after rules that were fitted on held-out data."""

__all__ = ["DECISIONS", "Abstention", "ConformalIntervals", "ConformalSets", "Decision", "Temperature"]

from typing import TypeAlias

from .abstention import Abstention
from .conformal_intervals import ConformalIntervals
from .conformal_sets import ConformalSets
from .temperature import Temperature

Decision: TypeAlias = Temperature | ConformalSets | ConformalIntervals | Abstention
"""A rule of plain numbers, which is called with a prediction."""

DECISIONS = {kind.__name__: kind for kind in (Temperature, ConformalSets, ConformalIntervals, Abstention)}
"""The kinds of rules, by the names that stand in files."""
