"""Plain modules made from a posterior, which other runtimes can execute."""

__all__ = ["Ensemble", "freeze"]

from .freeze import Ensemble, freeze
