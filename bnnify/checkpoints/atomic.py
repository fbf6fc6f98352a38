"""Files and folders that are there whole or not at all."""

__all__ = ["check_new_folder", "fill_new_folder", "replace_atomically"]

import os
import secrets
import shutil
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


def check_new_folder(path: str | os.PathLike[str]) -> None:
    """Raise a CheckpointError where ``path`` is there, and is no empty folder, or has no folder to stand in."""
    target = Path(path)
    if target.exists() and not (target.is_dir() and next(target.iterdir(), None) is None):
        raise CheckpointError(f"Cannot write `{path}`: shards are written into a new folder. Choose another name.")
    if not target.absolute().parent.is_dir():
        raise CheckpointError(f"Cannot write `{path}`: its folder does not exist.")


@contextmanager
def fill_new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a folder beside ``path`` to put files into and, when the block ends well, rename it to ``path``.

    Whatever interrupts the block, nothing is left.

    Raises:
        CheckpointError: The folder cannot be written, or is there already and not empty.
    """
    check_new_folder(path)
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}.part")
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())
        if target.exists():
            target.rmdir()  # it is empty; not every system lets it be replaced
        temporary.rename(target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            reason = error.strerror or type(error).__name__
            raise CheckpointError(f"Cannot write `{path}`: {reason}. Nothing was left there.") from error
        raise
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
