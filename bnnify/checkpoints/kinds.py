"""The kinds of priors, rules for σ and posteriors that bnnify knows by name, in files and on the command line."""

__all__ = ["KINDS", "POSTERIORS", "PRIORS", "STARTING_STDS"]

from typing import Any

from ..distributions.elementwise import Elementwise
from ..distributions.initial_std import Constant, Moped, Relative
from ..distributions.priors import Gaussian, Laplace, Pretrained, ScaleMixture
from ..modules.mean_field import MeanField
from ..modules.point import Point

PRIORS = {kind.__name__: kind for kind in (Gaussian, Laplace, Pretrained, ScaleMixture)}
STARTING_STDS = {kind.__name__: kind for kind in (Constant, Moped, Relative)}
POSTERIORS: dict[str, type[MeanField] | type[Point]] = {"mean-field": MeanField, "point": Point}
"""The posteriors under the names that they have on the command line."""

# A prior, rule or posterior of the user's own has no place in a file that must load without running code.
KINDS: dict[str, Any] = {
    kind.__name__: kind for kind in (Elementwise, *PRIORS.values(), *STARTING_STDS.values(), *POSTERIORS.values())
}
"""All of them by the names of their classes, as they stand in a file."""
