"""The typed errors of bnnify: each names the module, file or argument, says what was found and what to do."""

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "BnnifyError",
    "CheckpointError",
    "ConversionError",
    "DrawError",
    "MissingLibraryError",
]


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


class MissingLibraryError(BnnifyError, ImportError):
    """A library that only this function needs is not installed."""
