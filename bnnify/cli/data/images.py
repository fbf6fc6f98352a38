"""Images: a folder with a folder for each class, files, or a table of paths and labels."""

__all__ = ["is_image", "read_files", "read_folder", "read_paths"]

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import ArgumentError, needing
from .examples import Examples, Request
from .labels import class_numbers

_ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def is_image(path: Any) -> bool:
    """Tell an image by its ending."""
    return isinstance(path, (str, Path)) and Path(path).suffix.lower() in _ENDINGS


def read_folder(source: str, request: Request) -> Examples:
    """Read a folder whose folders are named after the classes, or one of images without labels.

    Raises:
        ArgumentError: There is no image, one stands outside of the folders of classes, or labels are missing.
    """
    folder = Path(source)
    files = sorted(path for path in folder.rglob("*") if is_image(path) and not _is_hidden(path.relative_to(folder)))
    if not files:
        raise ArgumentError(f"`{source}` holds no images ({', '.join(sorted(_ENDINGS))}).")
    names = [str(path.relative_to(folder)) for path in files]
    parts = [path.relative_to(folder).parts for path in files]
    if request.labelled is False or all(len(each) == 1 for each in parts):
        return _with_images(files, names, None, (), request)
    stray = next((name for name, each in zip(names, parts, strict=True) if len(each) == 1), None)
    if stray is not None:
        raise ArgumentError(f"`{source}` has folders of classes, and beside them the image {stray}, which is in none.")
    targets, classes = class_numbers(source, [each[0] for each in parts], request.classes)
    return _with_images(files, names, targets, classes, request)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def read_files(paths: Sequence[Path], request: Request) -> Examples:
    """Read image files without labels."""
    return _with_images(list(paths), list(map(str, paths)), None, (), request)


def read_paths(source: str, paths: Sequence[str], labels: Sequence[Any] | None, request: Request) -> Examples:
    """Read the images whose ``paths``, beside the file ``source`` or absolute, and labels stand in a table."""
    files = [Path(source).parent / path for path in paths]
    absent = next((path for path in files if not path.is_file()), None)
    if absent is not None:
        raise ArgumentError(f"`{source}` names the image `{absent}`, which is not there.")
    targets, classes = (None, ()) if labels is None else class_numbers(source, labels, request.classes)
    return _with_images(files, list(paths), targets, classes, request)


def _with_images(
    files: Sequence[Path], names: Sequence[str], targets: Tensor | None, classes: tuple[str, ...], request: Request
) -> Examples:
    with needing("pillow", "To read images"):
        from PIL import Image

    def read(number: int) -> Tensor:
        if not files[number].is_file():
            raise ArgumentError(f"`{files[number]}` is not there.")
        try:
            with Image.open(files[number]) as image:
                return request.image(image)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            reason = str(error).replace(str(files[number]), "it").replace("''", "it")
            raise ArgumentError(f"Cannot read the image `{files[number]}`: {reason}.") from error

    return Examples(read, names, targets, classes, files)
