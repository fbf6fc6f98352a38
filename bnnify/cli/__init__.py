"""The command ``bnnify-cli``: a thin face over the library."""

__all__ = ["main"]

from .command import main
