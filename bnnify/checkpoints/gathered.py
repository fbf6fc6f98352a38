"""The whole of a sharded model, gathered and written by one rank."""

__all__ = ["gathered", "written_by_one"]

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..draws.sharding import is_distributed
from ..errors import CheckpointError


def gathered(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Gather on the first rank what is sharded, one tensor after another, in the memory of the CPU.

    All ranks have to call this. No rank holds more than one whole tensor at a time, but for the first.

    Returns:
        On the first rank everything in ``state_dict``, with tied tensors still tied; None on the others.
    """
    is_first = dist.get_rank() == 0
    whole: dict[int, Tensor] = {}
    for value in state_dict.values():
        if is_distributed(value) and id(value) not in whole:
            tensor = value.full_tensor().detach()
            if is_first:
                whole[id(value)] = tensor.cpu()
    return {name: whole.get(id(value), value) for name, value in state_dict.items()} if is_first else None


def written_by_one(path: Any, write: Callable[[], object]) -> None:
    """Let the first rank write, and the others wait until it has.

    Raises:
        CheckpointError: On every rank, if it could not.
    """
    failed: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            write()
        except Exception as error:
            failed = [error]
    reason = [None if failed[0] is None else str(failed[0])]
    dist.broadcast_object_list(reason, src=0)
    if failed[0] is not None:
        raise failed[0]
    if reason[0] is not None:
        raise CheckpointError(f"The first rank could not write `{path}`: {reason[0]}")
