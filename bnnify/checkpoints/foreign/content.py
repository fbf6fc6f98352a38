"""The content of a checkpoint, and the weights in what was unpickled."""

__all__ = ["Checkpoint", "from_content"]

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .archive import Refusal
from .layout import Layout, find, has_state_dict
from .pickled_modules import build_module
from .records import is_module, modules_as_state_dicts, plain


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint of unknown origin.

    Attributes:
        state_dict: The model's weights under the model's names, on the CPU; mapped from the file if it can be.
        layout: How the file held them.
        rest: The other content, as plain data, with what is left of the state_dict where it stood.
        module: The pickled module or the exported program's module, where the file held one.
        config: The parsed ``config.json`` of a Hugging Face model directory, or the ``adapter_config.json`` of an
            adapter's.
        left_out: What the file held beside the weights that is no plain data and cannot be kept: where it stood, and
            its class.
    """

    state_dict: dict[str, Tensor]
    layout: Layout
    rest: Mapping[str, Any] = field(default_factory=dict)
    module: nn.Module | None = None
    config: Mapping[str, Any] | None = None
    left_out: Sequence[str] = ()

    @property
    def is_adapter(self) -> bool:
        """True if the tensors are those of an adapter, which needs a base model."""
        return self.config is not None and "peft_type" in self.config

    @property
    def beside(self) -> list[str]:
        """Name the tensors that stood in one mapping with the weights, and are not the model's."""
        mapping: Any = self.rest
        for key in self.layout.keys:
            mapping = mapping.get(key, {}) if isinstance(mapping, Mapping) else {}
        return [name for name, value in mapping.items() if isinstance(value, Tensor)]


def from_content(content: Any, kind: str, key: str | None, names: Collection[str] | None) -> Checkpoint:
    """Find the weights in what was unpickled: a module, or a state_dict somewhere in it.

    Where the model is known, only the tensors of a pickled module are needed, and its class may be anybody's.
    """
    if names is not None:
        content = modules_as_state_dicts(content)
    elif (place := _place_of_module(content, key)) is not None:
        value = content.get(place[0]) if place else content
        try:
            module = value if isinstance(value, nn.Module) else build_module(value)
        except Refusal:
            if not has_state_dict(content):
                raise
        else:
            others = {name: other for name, other in content.items() if name != place[0]} if place else {}
            rest, left_out = plain(others)
            state_dict = module.state_dict()
            return Checkpoint(state_dict, Layout(kind, place, "", tuple(state_dict)), rest, module, left_out=left_out)
    state_dict, layout, rest = find(content, kind, key, names)
    rest, left_out = plain(rest)
    return Checkpoint(state_dict, layout, rest, left_out=left_out)


def _place_of_module(content: Any, key: str | None) -> tuple[str, ...] | None:
    """Find the key under which a module stands, ``()`` if it is the whole content; None if there is none."""
    if isinstance(content, Mapping):
        usual = (key,) if key is not None else ("model", "module", "net", "network", "state_dict")
        return next(((name,) for name in usual if _is_module(content.get(name))), None)
    return () if _is_module(content) else None


def _is_module(value: Any) -> bool:
    return isinstance(value, nn.Module) or is_module(value)
