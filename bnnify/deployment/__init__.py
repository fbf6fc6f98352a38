"""Ways out of Python and of this package: plain modules that draw nothing any more."""

__all__ = ["Ensemble", "freeze"]

from .freeze import Ensemble, freeze
