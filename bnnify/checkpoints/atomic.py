"""Files that are there whole or not at all."""

__all__ = ["replace_atomically"]

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..errors import CheckpointError


@contextmanager
def replace_atomically(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Write a file beside ``path`` and, when the block ends well, rename it to ``path``.

    Whatever interrupts the block, no part of the file is left under the name ``path``, and what was there before stays.
    The file has the permissions that the process gives to any new file. A symbolic link is followed.

    Raises:
        CheckpointError: The file cannot be written: no such folder, no permission, a full disk, or ``path`` is
            something else than an ordinary file.
    """
    target = Path(os.path.realpath(path))
    if os.path.exists(target) and not os.path.isfile(target):
        raise CheckpointError(f"Cannot write `{path}`: it is there and is not an ordinary file. Choose another name.")
    # Not tempfile.mkstemp, which makes files that nobody else may read.
    temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}.part")
    file = None
    try:
        with open(temporary, "xb") as opened:
            file = _RememberingErrors(opened)
            mode = os.fstat(opened.fileno()).st_mode
            yield file  # type: ignore[misc]
        # A library that was given the name has put a file of its own there.
        os.chmod(temporary, mode)
        with open(temporary, "rb+") as opened:
            os.fsync(opened.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        if file is not None:
            temporary.unlink(missing_ok=True)
        # torch.save reports a full disk as a RuntimeError that does not say so.
        reason = error if isinstance(error, OSError) else getattr(file, "error", None)
        if reason is None or not isinstance(error, Exception):
            raise
        raise CheckpointError(
            f"Cannot write `{path}`: {reason.strerror or type(reason).__name__}. Nothing was left there."
        ) from error
    _sync_folder(target.parent)


class _RememberingErrors:
    """A file to write to that keeps the reason for which a write failed.

    It has no ``fileno``: otherwise torch would write past it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.name = file.name
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def _sync_folder(folder: Path) -> None:
    """Make the new name outlive a power failure, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
