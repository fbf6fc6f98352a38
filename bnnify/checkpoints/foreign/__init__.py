"""Read files of unknown origin without running anything in them, and write them back as they were."""

__all__ = ["Checkpoint", "read", "write"]

from .read_write import Checkpoint, read, write
