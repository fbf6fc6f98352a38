"""The promises of a converted model, once: for the zoo, for the odd models of other test files, and for the sweep."""

from . import outputs
from .case import Case, Inputs
from .examination import Outcome, broken, drawn_network, examine
from .promises import CHECKS

__all__ = ["CHECKS", "Case", "Inputs", "Outcome", "broken", "drawn_network", "examine", "outputs"]
