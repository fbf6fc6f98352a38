"""The version of the package, which comes from the tag of the repository."""

__all__ = ["__version__"]

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("bnnify")
except PackageNotFoundError:  # a checkout on the path that nobody installed
    __version__ = "0"
