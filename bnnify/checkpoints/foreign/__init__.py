"""Files of other people: read without running anything in them, and written back as they were."""

__all__ = ["Foreign", "read", "write"]

from .read_write import Foreign, read, write
