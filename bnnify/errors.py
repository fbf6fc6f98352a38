"""The typed errors of bnnify: each names the module or file, says what was found and what to do."""

__all__ = ["BnnifyError", "CheckpointError", "ConversionError", "DrawError"]


class BnnifyError(Exception):
    """The base of every error that bnnify raises on purpose."""


class ConversionError(BnnifyError, ValueError):
    """A model, a layer or a setting that cannot be converted."""


class DrawError(BnnifyError, RuntimeError):
    """A converted model that can no longer be sampled, because it was changed after its conversion."""


class CheckpointError(BnnifyError, ValueError):
    """A checkpoint that cannot be read, or that does not fit the model."""
