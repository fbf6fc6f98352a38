"""The places of a model in which parameters and buffers stand; a tied one has several."""

__all__ = ["TensorPlace", "places_of", "put", "valueless_buffers"]

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..modules.bayesian_class import allow_replacement
from ..torch_internals import non_persistent_buffers


@dataclass(frozen=True)
class TensorPlace:
    """One place of a parameter or buffer: a module, an attribute of it, and a name of the two together."""

    module: nn.Module
    attribute: str
    name: str

    @property
    def tensor(self) -> Any:
        """Return what stands there now."""
        return self.module._parameters.get(self.attribute, self.module._buffers.get(self.attribute))


def places_of(root: nn.Module) -> dict[Tensor, list[TensorPlace]]:
    """Map every parameter and buffer of ``root`` to its places, one for each of its names."""
    places: dict[Tensor, list[TensorPlace]] = {}
    for prefix, module in root.named_modules(remove_duplicate=False):
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                place = TensorPlace(module, attribute, f"{prefix}.{attribute}".removeprefix("."))
                places.setdefault(tensor, []).append(place)
    return places


def put(places: Iterable[TensorPlace], tensor: Any) -> None:
    """Let all places hold ``tensor``, as places of a tied one do."""
    for place in places:
        if place.tensor is not tensor:
            with allow_replacement(place.module):
                setattr(place.module, place.attribute, tensor)


def valueless_buffers(root: nn.Module) -> list[str]:
    """Name the buffers on the meta device to which no state_dict can give a value."""
    return [
        f"{prefix}.{attribute}".removeprefix(".")
        for prefix, module in root.named_modules()
        for attribute in sorted(non_persistent_buffers(module))
        if (buffer := module._buffers.get(attribute)) is not None and buffer.is_meta
    ]
