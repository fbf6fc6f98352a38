"""The typed errors of bnnify, and the checks of arguments that raise them.

Each names the module, file or argument, says what was found and what to do.
"""

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "BnnifyError",
    "CheckpointError",
    "ConversionError",
    "DrawError",
    "ExportError",
    "MissingLibraryError",
    "as_number",
    "check_integer",
    "check_module",
    "check_num_samples",
    "check_path",
    "check_positive",
    "check_share",
    "check_tensor",
    "checked_seed",
    "describe",
    "needing",
]

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

from torch import Tensor, nn


class BnnifyError(Exception):
    """The base of every error that bnnify raises on purpose."""


class ArgumentError(BnnifyError, ValueError):
    """An argument, or data, whose value a function cannot work with."""


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument, or data, of a type that a function cannot work with."""


class ConversionError(BnnifyError, ValueError):
    """A model, a layer or a setting that cannot be converted."""


class DrawError(BnnifyError, RuntimeError):
    """A converted model that cannot be sampled: it was changed since, or called in a way it cannot be."""


class CheckpointError(BnnifyError, ValueError):
    """A checkpoint that cannot be read, or that does not fit the model."""


class ExportError(BnnifyError, RuntimeError):
    """A model that cannot be exported, or a file that does not compute what the model does."""


class MissingLibraryError(BnnifyError, ImportError):
    """A library that only this function needs is not installed."""


def describe(value: Any) -> str:
    """A few words for a value in an error: its type, a tensor's shape, and what it is if that is short."""
    if isinstance(value, Tensor):
        return f"a {type(value).__name__} of shape {tuple(value.shape)}"
    if value is None or isinstance(value, (bool, int, float, complex)):
        return repr(value)
    if isinstance(value, str):
        return f"the string {value[:40]!r}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {value.__name__} (the class itself)" if isinstance(value, type) else f"a {type(value).__name__}"


def as_number(name: str, value: Any, hint: str = "") -> Any:
    """A real number, or the one number in a tensor without dimensions, that was given as ``name``.

    Raises:
        ArgumentTypeError: It is something else; ``hint`` is a sentence on what to pass.
    """
    if isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex():
        return value.item()
    if isinstance(value, (int, float, Real)):
        return value
    raise ArgumentTypeError(f"{name} must be a number, not {describe(value)}. {hint}".strip())


def check_integer(name: str, value: Any) -> None:
    """Raise an ArgumentTypeError unless ``value``, which was given as ``name``, is an integer."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ArgumentTypeError(f"{name} must be an integer, not {describe(value)}.")


def check_module(name: str, value: Any) -> None:
    """Raise an ArgumentTypeError unless ``value``, which was given as ``name``, is a module."""
    if not isinstance(value, nn.Module):
        raise ArgumentTypeError(f"{name} must be a torch.nn.Module, not {describe(value)}.")


def check_tensor(name: str, value: Any, hint: str = "") -> None:
    """Raise an ArgumentTypeError unless ``value``, which was given as ``name``, is a tensor."""
    if not isinstance(value, Tensor):
        raise ArgumentTypeError(f"{name} must be a tensor, not {describe(value)}. {hint}".strip())


def check_num_samples(num_samples: Any, name: str = "num_samples") -> None:
    """Raise an ArgumentError unless ``num_samples``, which was given as ``name``, is a positive integer."""
    if isinstance(num_samples, bool) or not isinstance(num_samples, Integral) or num_samples < 1:
        raise ArgumentError(f"{name} must be a positive integer, not {num_samples!r}.")


def checked_seed(name: str, value: Any) -> int:
    """Return the seed that was given as ``name``, as an integer of Python's: numpy's are none to torch.

    Raises:
        ArgumentError: It is not between 0 and 2⁶³ - 1.
        ArgumentTypeError: It is no integer.
    """
    check_integer(name, value)
    if not 0 <= value < 2**63:
        raise ArgumentError(f"{name} must be an integer from 0 to 2**63 - 1, not {value}.")
    return int(value)


def check_path(name: str, value: Any) -> None:
    """Raise an ArgumentTypeError unless ``value``, which was given as ``name``, can name a file."""
    if not isinstance(value, (str, os.PathLike)):
        raise ArgumentTypeError(f"{name} must be a path, not {describe(value)}.")


def check_positive(name: str, value: Any, kind: type[BnnifyError] = ConversionError) -> None:
    """Raise a ``kind`` of error unless ``value``, which was given as ``name``, is a positive, finite number."""
    if isinstance(value, bool) or not (isinstance(value, (int, float)) and 0 < value < math.inf):
        raise kind(f"{name} must be a positive, finite number, not {value!r}.")


def check_share(name: str, value: Any) -> None:
    """Raise an ArgumentError unless ``value``, which was given as ``name``, lies between 0 and 1, ends excluded."""
    if isinstance(value, bool) or not (isinstance(value, (int, float)) and 0 < value < 1):
        raise ArgumentError(f"{name} must be a number between 0 and 1, not {value!r}.")


@contextmanager
def needing(libraries: str, wanted_by: str) -> Iterator[None]:
    """Explain an ImportError in the block, which imports ``libraries``, with spaces between them, for ``wanted_by``.

    Raises:
        MissingLibraryError: The block raised an ImportError.
    """
    try:
        yield
    except ImportError as error:
        names = ", ".join(libraries.split())
        raise MissingLibraryError(f"{wanted_by} needs {names}: pip install {libraries}.") from error
