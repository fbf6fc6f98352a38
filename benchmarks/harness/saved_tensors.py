"""How many bytes the autograd graph of a loss keeps for its backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor


def saved_bytes(loss: Callable[[], Tensor], besides: Iterable[Tensor]) -> int:
    """What the graph of the loss keeps, each storage once, without those of the tensors that are there anyway.

    It counts what is saved by `ctx.save_for_backward` or by an operator of torch; a tensor that an autograd function
    hides elsewhere it cannot see.
    """
    saved: list[weakref.ref[_Saved]] = []

    def pack(tensor: Tensor) -> _Saved:
        kept = _Saved(tensor)
        saved.append(weakref.ref(kept))
        return kept

    with saved_tensors_hooks(pack, lambda kept: kept.tensor):
        result = loss()
    # What belongs to a part of the graph that the loss does not depend on is gone by now, and its reference with it.
    tensors = [kept.tensor for reference in saved if (kept := reference()) is not None]
    # Of a DTensor this rank has its part.
    alive = [(t.to_local() if isinstance(t, DTensor) else t).untyped_storage() for t in tensors]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in alive}
    for tensor in besides:
        sizes.pop(tensor.untyped_storage().data_ptr(), None)
    del result
    return sum(sizes.values())


def nbytes(tensors: Iterable[Tensor]) -> int:
    """What the tensors take, each storage once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class _Saved:
    """A saved tensor; unlike the tensor it lives exactly as long as the graph needs it.

    Detached, because a function that saves its own result would otherwise be kept alive by it for ever.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()
