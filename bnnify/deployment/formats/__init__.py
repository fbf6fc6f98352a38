"""File formats of exported networks, each with the runtime that executes it."""

__all__ = ["FORMATS", "Format", "Runner", "format_for"]

from .format import Format, Runner
from .known_formats import FORMATS, format_for
