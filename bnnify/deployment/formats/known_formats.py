"""The table of formats."""

__all__ = ["FORMATS", "format_for"]

import os
from pathlib import Path

from ...errors import ArgumentError
from .aot_inductor import AOTInductor
from .executorch import ExecuTorch
from .format import Format
from .onnx import Onnx
from .torch_export import TorchExport

FORMATS: dict[str, Format] = {each.name: each for each in (Onnx(), TorchExport(), AOTInductor(), ExecuTorch())}
"""By name; of several with one ending, the first is the one that the ending means."""


def format_for(path: str | os.PathLike[str], name: str | None) -> Format:
    """Look up the format with this name, or by the ending of ``path``.

    Raises:
        ArgumentError: There is none, or its files end otherwise.
    """
    ending = Path(path).suffix
    if name is None:
        fitting = [each for each in FORMATS.values() if each.ending == ending]
        if not fitting:
            known = ", ".join(sorted({each.ending for each in FORMATS.values()}))
            raise ArgumentError(f"`{path}` does not say which format to write: known endings are {known}.")
        return fitting[0]
    if name not in FORMATS:
        raise ArgumentError(f"Unknown format {name!r}: known are {', '.join(FORMATS)}.")
    if FORMATS[name].ending != ending:
        raise ArgumentError(f"A file of the format {name!r} must end in {FORMATS[name].ending}: `{path}` does not.")
    return FORMATS[name]
