"""Recognise the architecture that a state_dict comes from, and make that model again."""

__all__ = ["Recipe", "Recognition", "recognise"]

from .recipe import Recipe
from .recognition import Recognition, recognise
