"""What the name of a file of weights may promise."""

__all__ = ["check_ending", "is_one_file"]

import os
from pathlib import Path

from ..errors import CheckpointError

_EXPORTED = {".onnx", ".pt2", ".pte", ".so"}
_OTHERS = {".csv", ".gguf", ".gz", ".h5", ".hdf5", ".html", ".json", ".jsonl", ".npy", ".npz", ".pb", ".png", ".tflite"}
"""Endings of formats that a file of weights has not; whoever opens it by its name would be misled."""


_WEIGHTS = {".bin", ".ckpt", ".pt", ".pth", ".safetensors"}


def is_one_file(path: str | os.PathLike[str]) -> bool:
    """Tell whether the name promises one file of weights, and no folder of shards."""
    return Path(path).suffix.lower() in _WEIGHTS


def check_ending(path: str | os.PathLike[str]) -> None:
    """Raise a CheckpointError where the name promises another format than one of weights."""
    ending = Path(path).suffix.lower()
    if ending in _EXPORTED | _OTHERS:
        hint = " `bnnify.export` and `bnnify-cli export` write networks in such formats." if ending in _EXPORTED else ""
        raise CheckpointError(
            f"Cannot write `{path}`: a file of weights ends in .pt or .safetensors, not in {ending}.{hint}"
        )
