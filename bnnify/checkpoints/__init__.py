"""Files in and out: converted models, weights, and checkpoints of any kind."""

__all__ = ["convert_checkpoint", "load", "load_weights", "save"]

from .convert_checkpoint import convert_checkpoint
from .load_weights import load_weights
from .save_load import load, save
