"""Failures told in one line that names the file."""

__all__ = ["explained"]

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...errors import CheckpointError
from .archive import Refusal


@contextmanager
def explained(path: Path, verb: str = "read") -> Iterator[None]:
    """Turn every failure in the block into an error of one line that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except Refusal as refusal:
        raise CheckpointError(_one_line(f"Cannot {verb} `{path}`: {refusal}")) from refusal
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200].rstrip('.')}"
        if verb == "read":
            # What garbage leads to is without number: a damaged file is as good an explanation as the file deserves.
            reason = f"it is damaged or not a checkpoint ({reason}). Get the file again, or save model.state_dict()"
        raise CheckpointError(_one_line(f"Cannot {verb} `{path}`: {reason}.")) from error


def _one_line(text: str) -> str:
    """Return ``text`` without what a file could do to a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)[:900]
