"""What a forward may leave behind: in its module, and in its arguments."""

__all__ = ["ModuleState", "cloned"]

import copy
from typing import Any

from torch import Tensor, nn

from ..torch_internals import tree_map


class ModuleState:
    """The buffers and attributes of a module and those in it, and what is in their lists and mappings.

    Buffers are cloned; other tensors and objects are only remembered, so that what is done to them in place stays.
    """

    def __init__(self, root: nn.Module) -> None:
        attributes = [module.__dict__ for module in root.modules()]
        containers = [value for each in attributes for value in each.values() if isinstance(value, (dict, list))]
        self._containers = [(container, copy.copy(container)) for container in [*attributes, *containers]]
        self._buffers = {buffer: buffer.clone() for buffer in root.buffers()}

    def restore(self) -> None:
        for container, before in self._containers:
            container.clear()
            if isinstance(container, list):
                container.extend(before)
            else:
                container.update(before)
        for buffer, value in self._buffers.items():
            buffer.copy_(value)


def cloned(arguments: Any) -> Any:
    """Copy arguments of a module, caches in them included; what cannot be copied is passed on as it is."""

    def clone(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.clone()  # a deep copy would take all of the storage of which this is a part
        try:
            return copy.deepcopy(leaf)
        except Exception:
            return leaf

    return tree_map(clone, arguments)
