"""Models in several safetensors files with an index, as Hugging Face writes them."""

__all__ = ["INDEX", "as_bytes", "write_shards"]

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import ArgumentError, describe
from ..atomic import fill_new_folder
from .explained import explained
from .formats import import_safetensors

INDEX = "model.safetensors.index.json"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def as_bytes(size: Any) -> int:
    """Return a size such as ``5_000_000_000`` or ``"5GB"`` in bytes.

    Raises:
        ArgumentError: It is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMG]B)", size.upper()) if isinstance(size, str) else None
    if isinstance(size, str) and size.isdecimal():
        size = int(size)
    number = int(float(found[1]) * _UNITS[found[2]]) if found else size if isinstance(size, int) else 0
    if isinstance(size, bool) or number < 1:
        raise ArgumentError(f'max_shard_size must be a number of bytes or a text such as "5GB", not {describe(size)}.')
    return number


def write_shards(
    folder: str | os.PathLike[str],
    shards: Iterable[Mapping[str, Tensor]],
    count: int,
    *,
    metadata: Mapping[str, str],
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write a new folder with a file for each of the shards and their index, and with ``config`` as its config.json.

    The shards are taken and written one after another, so that no more than one need be in memory. The folder is
    complete or not there.

    Args:
        folder: The folder, which must not be there yet.
        shards: The tensors of each, dense, contiguous, and on the CPU.
        count: How many they are.
        metadata: What the index holds beside the names.
        config: The description of a Hugging Face model. Default: ``None``, none is written.

    Raises:
        CheckpointError: The folder cannot be written, or is there already.
    """
    names: dict[str, str] = {}
    total = 0
    with explained(Path(folder), "write"), fill_new_folder(folder) as made:
        save_file = import_safetensors().torch.save_file
        for number, tensors in enumerate(shards, 1):
            name = f"model-{number:05d}-of-{count:05d}.safetensors"
            save_file(dict(tensors), made / name, {"format": "pt"})
            names |= dict.fromkeys(tensors, name)
            total += sum(tensor.nbytes for tensor in tensors.values())
        content = {INDEX: {"metadata": {"total_size": total, **metadata}, "weight_map": names}}
        if config is not None:
            content["config.json"] = dict(config)
        for name, data in content.items():
            (made / name).write_text(json.dumps(data, indent=2), encoding="utf-8")
