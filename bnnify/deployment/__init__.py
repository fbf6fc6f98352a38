"""Plain modules made from a posterior, and files that other runtimes execute."""

__all__ = ["Ensemble", "Export", "export", "freeze", "quantize"]

from .export import Export, export
from .freeze import Ensemble, freeze
from .quantize import quantize
