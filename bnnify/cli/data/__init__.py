"""The data of a command: readers of folders and files, and what comes of them."""

__all__ = ["READERS", "Examples", "Request", "read_data"]

from .examples import Examples, Request
from .readers import READERS, read_data
