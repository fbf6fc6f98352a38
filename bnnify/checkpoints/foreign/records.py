"""The inert records that stand for the objects of a pickle: plain data without them, and the tensors in them."""

__all__ = ["MAX_NAMES", "Instance", "Name", "is_module", "modules_as_state_dicts", "plain", "record_in"]

from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .archive import Refusal

_REGISTRIES = ("_parameters", "_buffers", "_modules")
_MAPPINGS = (dict, OrderedDict, Counter)
_COLLECTIONS = (list, tuple, set, frozenset)
_SCALARS = (type(None), bool, int, float, complex, str, bytes, bytearray)
_OF_TORCH = (torch.Size, torch.device, torch.dtype, torch.layout)
_PLAIN = frozenset((*_MAPPINGS, *_COLLECTIONS, *_SCALARS, *_OF_TORCH))
# A module registered twice, in a module registered twice, …: few objects can have more names than can be walked.
MAX_NAMES = 200_000


@dataclass(eq=False, frozen=True)
class Name:
    """A class or function that the file names. It stays a name."""

    name: str


@dataclass(eq=False)
class Instance:
    """An object of a class that the file names: what would have been its arguments and its ``__dict__``."""

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None


def plain(value: Any) -> tuple[Any, list[str]]:
    """Return ``value`` without what is no plain data, and what was left out, each as its place and its class."""
    walk = _Plain()
    return walk.visit(value, ""), walk.left_out


def record_in(value: Any) -> str | None:
    """Return the class that ``value`` is a record of, or the first record that stands in it, if it is a mapping."""
    for item in (value, *(value.values() if isinstance(value, dict) else ())):
        if isinstance(item, (Instance, Name)):
            return item.name
    return None


def modules_as_state_dicts(content: Any, done: dict[int, Any] | None = None) -> Any:
    """Put a state_dict in the place of each pickled module that has tensors, whatever its class.

    Modules are looked for in ``content`` itself and in mappings of it.
    """
    done = {} if done is None else done
    if not isinstance(content, Instance) and type(content) not in _MAPPINGS:
        return content
    # A few mappings that hold each other a thousand times have more paths than can be walked.
    if id(content) not in done:
        done[id(content)] = content
        if isinstance(content, Instance):
            done[id(content)] = _state_dict_of(content) or content
        else:
            replaced = {name: modules_as_state_dicts(value, done) for name, value in content.items()}
            if any(replaced[name] is not value for name, value in content.items()):
                done[id(content)] = type(content)(replaced)
    return done[id(content)]


class _Plain:
    """One walk through a value; lists that hold each other twice have more paths than can be walked one by one."""

    def __init__(self) -> None:
        self.left_out: list[str] = []
        self._done: dict[int, Any] = {}

    def visit(self, value: Any, place: str) -> Any:
        if type(value) not in (*_MAPPINGS, *_COLLECTIONS):
            return value
        if id(value) not in self._done:
            self._done[id(value)] = self._without_records(value, place)
        return self._done[id(value)]

    def _without_records(self, value: Any, place: str) -> Any:
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
        kept = []
        for key, item in items:
            label = str(key)[:80] if isinstance(key, (str, int)) else "…"
            where = f"{place}.{label}".removeprefix(".")[:160]
            if found := _class_unless_plain(item) or _class_unless_plain(key):
                self.left_out.append(f"`{where}` ({found[:80]})")
            else:
                kept.append((key, self.visit(item, where)))
        if len(kept) == len(items) and all(new is old for (_, new), (_, old) in zip(kept, items, strict=True)):
            return value  # as it is, with the metadata that a state_dict has as an attribute
        return type(value)(dict(kept) if isinstance(value, dict) else [item for _, item in kept])


def _class_unless_plain(value: Any) -> str | None:
    """Name the class of what is no plain data; of a tuple, as a key may be, that of the first such part."""
    for part in value if type(value) is tuple else (value,):
        if isinstance(part, (Instance, Name)):
            return part.name
        if type(part) not in _PLAIN and not isinstance(part, Tensor):
            return f"{type(part).__module__}.{type(part).__qualname__}"
    return None


def is_module(value: Any) -> bool:
    """Tell whether ``value`` is the record of a module: its state has the registries that every module has."""
    state = value.state if isinstance(value, Instance) else None
    return type(state) is dict and all(isinstance(state.get(name), dict) for name in _REGISTRIES)


def _state_dict_of(instance: Instance) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers in the record of a module; nothing for that of something else.

    Raises:
        Refusal: A module in it contains itself, or its modules have too many names.
    """
    tensors: dict[str, Tensor] = OrderedDict()
    left, open_modules = MAX_NAMES, set[int]()

    def collect(module: Any, prefix: str) -> None:
        nonlocal left
        if not is_module(module):
            return
        state = module.state
        left -= 1
        if id(module) in open_modules or left < 0:
            raise Refusal("its modules are registered in each other too often. Save model.state_dict() instead.")
        open_modules.add(id(module))
        unsaved = state.get("_non_persistent_buffers_set")
        unsaved = unsaved if isinstance(unsaved, set) else ()
        for name, tensor in (*state["_parameters"].items(), *state["_buffers"].items()):
            if isinstance(tensor, Tensor) and name not in unsaved:
                tensors[f"{prefix}{name}"] = tensor.detach()
        for name, child in state["_modules"].items():
            collect(child, f"{prefix}{name}.")
        open_modules.discard(id(module))

    collect(instance, "")
    return tensors
