"""Checks of the files that a command is to write, made before the work."""

__all__ = ["check_folder", "check_output", "check_picture", "check_weights_output", "renamed"]

from pathlib import Path

from ..checkpoints.endings import check_ending
from ..errors import CheckpointError

_PICTURES = {".jpeg", ".jpg", ".pdf", ".png", ".svg", ".webp"}


def check_folder(*paths: Path | None) -> None:
    """Raise a CheckpointError where a file cannot be written: its folder is not there, or it is a folder."""
    for path in paths:
        if path is not None and path.is_dir():
            raise CheckpointError(f"Cannot write `{path}`: it is a folder.")
        if path is not None and not path.absolute().parent.is_dir():
            raise CheckpointError(f"Cannot write `{path}`: its folder does not exist.")


def check_output(output: Path, force: bool, *read: Path) -> None:
    """Raise a CheckpointError where ``output`` cannot be written, or would replace what is ``read`` or, without
    ``force``, any file.
    """
    if output.exists() and any(each.exists() and output.samefile(each) for each in read):
        raise CheckpointError(f"Cannot write `{output}`: it is the input.")
    check_folder(output)
    if output.exists() and not force:
        raise CheckpointError(f"`{output}` exists. Choose another name with -o, or pass --force.")


def check_picture(picture: Path | None, force: bool, *read: Path) -> None:
    """Raise as :func:`check_output`, and where the name promises no picture; None is no picture."""
    if picture is None:
        return
    if picture.suffix.lower() not in _PICTURES:
        raise CheckpointError(f"Cannot write `{picture}`: a picture ends in {', '.join(sorted(_PICTURES))}.")
    if any(each.is_dir() and each.resolve() in picture.resolve().parents for each in read):
        raise CheckpointError(f"Cannot write `{picture}`: it would be one of the images in the input.")
    check_output(picture, force, *read)


def check_weights_output(output: Path, force: bool, source: Path) -> None:
    """Raise as :func:`check_output`, and where the name promises another format than one of weights."""
    check_ending(output)
    check_output(output, force, source)


def renamed(file: Path, ending: str) -> Path:
    """Return ``file`` with ``ending`` in the place of ``.bnn.pt`` and its like."""
    return file.with_name(file.name.removesuffix(".safetensors").removesuffix(".pt").removesuffix(".bnn") + ending)
