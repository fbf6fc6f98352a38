"""Collapse a sharded file without the model, one shard after another."""

__all__ = ["collapse_shards"]

import os
from collections.abc import Iterator

from torch import Tensor

from .foreign.layout import Layout, put_back
from .foreign.shards import write_shards
from .own_format import posterior_parts


def collapse_shards(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> int:
    """Write the posterior means of a file in shards as a checkpoint in as many shards; return the number of tensors.

    The names are those of the checkpoint that was converted. A Hugging Face model gets its config.json too, so that
    transformers reads the folder.

    Raises:
        CheckpointError: The file is not bnnify's or is damaged, or ``folder`` cannot be written.
    """
    # Nothing is read yet but headers.
    origins = [part.origin for part in posterior_parts(path)]
    written = 0

    def plain() -> Iterator[dict[str, Tensor]]:
        nonlocal written
        for part in posterior_parts(path):
            tensors = put_back(part.origin.layout or Layout("safetensors"), part.plain_state_dict, {})
            written += len(tensors)
            yield tensors

    config = origins[0].config if origins[0].adapter is None else None
    write_shards(folder, plain(), len(origins), metadata={}, config=config)
    return written
