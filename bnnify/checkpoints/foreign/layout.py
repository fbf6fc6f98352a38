"""Find a state_dict in a checkpoint, and put one back there."""

__all__ = ["Layout", "find", "has_state_dict", "is_dense", "place_of", "put_back"]

import copy
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...torch_internals import module_versions, set_module_versions
from ..architectures.shapes import COUNT
from .archive import Refusal
from .prefixes import common_prefix, is_weight, prefix_by_names, within
from .records import record_in

# Which of several state_dicts is the model's. They are never needed where there is one.
_USUAL = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params", "module")
_MAX_DEPTH = 6
_KINDS = ("torch", "torch-legacy", "safetensors")


@dataclass(frozen=True)
class Layout:
    """The place of the weights in a file.

    Attributes:
        kind: ``"torch"`` (the zip format), ``"torch-legacy"`` or ``"safetensors"``.
        keys: Under which keys of nested mappings the state_dict stood; ``()`` if it was the whole file.
        prefix: What was removed from the beginning of each name, such as ``"module."``.
        names: The names that the file had, without the prefix, in their order. A model may have more: other names of a
            tied parameter, or counts of batches that an old file lacks.
        of_model: The names that the model has for these, where they are others, as for an adapter on its base. The
            model's other tensors are not the file's. Empty where they are the same.
    """

    kind: str
    keys: tuple[str, ...] = ()
    prefix: str = ""
    names: tuple[str, ...] = ()
    of_model: tuple[str, ...] = ()

    def as_data(self) -> dict[str, Any]:
        """Return the layout as plain data."""
        data = {"kind": self.kind, "keys": list(self.keys), "prefix": self.prefix, "names": list(self.names)}
        return data | {"of_model": list(self.of_model)}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> "Layout":
        """Make the layout that gave ``data``.

        Raises:
            CheckpointError: Nothing of this version could have given it.
        """
        kind, keys, prefix, names = (data.get(field) for field in ("kind", "keys", "prefix", "names"))
        of_model = data.get("of_model", [])  # files up to format 4 have none
        lists_of_text = all(isinstance(x, list) and all(isinstance(y, str) for y in x) for x in (keys, names, of_model))
        if kind not in _KINDS or not isinstance(prefix, str) or not lists_of_text:
            raise CheckpointError("The record of the original file's layout is damaged. Convert the checkpoint again.")
        return cls(kind, tuple(keys or ()), prefix, tuple(names or ()), tuple(of_model))


def find(
    content: Any, kind: str, key: str | None, names: Collection[str] | None
) -> tuple[dict[str, Tensor], Layout, Any]:
    """Find the state_dict in what a file held; return it, its layout, and the rest of the content.

    Args:
        content: What the file held.
        kind: The layout's kind.
        key: Where to look, as a dotted path.
        names: The model's own names, if it is known: they tell the prefix, and which of several state_dicts is meant.
    """
    candidates = dict(_candidates(content))
    if not candidates and _is_mixed(content):
        candidates = {(): content}
    keys = _choose(candidates, key, names, content)
    found = candidates[keys]
    prefix = prefix_by_names(found, names) if names is not None else common_prefix(found, content)
    state_dict = within(found, prefix)
    taken = {prefix + name for name in state_dict}
    others = {name: value for name, value in found.items() if name not in taken}
    return state_dict, Layout(kind, keys, prefix, tuple(state_dict)), _replaced(content, keys, others)


def has_state_dict(content: Any) -> bool:
    """Tell whether there is a mapping of names to tensors in ``content``."""
    return next(_candidates(content), None) is not None


def put_back(layout: Layout, state_dict: Mapping[str, Any], rest: Mapping[str, Any]) -> dict[str, Any]:
    """Put ``state_dict`` back where :func:`find` found it, among the ``rest``."""
    if layout.of_model:
        state_dict = {name: state_dict[own] for name, own in zip(layout.names, layout.of_model, strict=True)}
    added = [name for name in state_dict if name not in set(layout.names) and not name.endswith(COUNT)]
    names = [name for name in layout.names if name in state_dict]
    given = {place_of(state_dict[name]) for name in names}
    for name in added:
        place = place_of(state_dict[name])
        if place is None or place not in given:  # else it is another name of a tied parameter
            names.append(name)
            given.add(place)
    others: Any = rest
    for key in layout.keys:
        others = others.get(key, {})
    whole: dict[str, Any] = OrderedDict((layout.prefix + name, state_dict[name]) for name in names)
    whole.update(others)
    versions = module_versions(state_dict)
    if versions is not None:
        wrapper = {"": {"version": 1}} if layout.prefix else {}
        names_of_modules = {(layout.prefix + name).removesuffix("."): value for name, value in versions.items()}
        set_module_versions(whole, OrderedDict(wrapper | names_of_modules))
    return _replaced(rest, layout.keys, whole)


def _candidates(
    content: Any, path: tuple[str, ...] = (), seen: set[int] | None = None
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Yield each mapping of names to tensors that is reached through mappings with names as keys."""
    # A few mappings that hold each other a thousand times have more paths than can be walked.
    seen = set() if seen is None else seen
    if id(content) in seen or not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        return
    seen.add(id(content))
    values = content.items()
    if any(map(is_dense, content.values())) and all(is_weight(*item) for item in values):
        yield path, content
    elif len(path) < _MAX_DEPTH:
        for name, value in values:
            yield from _candidates(value, (*path, name), seen)


def is_dense(value: Any) -> bool:
    """Tell whether ``value`` is a tensor of the usual kind, whose elements stand in memory as they are."""
    return isinstance(value, Tensor) and value.layout == torch.strided


def _is_mixed(content: Any) -> bool:
    """Tell whether the weights stand beside the epoch and the like, in one mapping."""
    return isinstance(content, Mapping) and any(
        isinstance(name, str) and "." in name and isinstance(value, Tensor) for name, value in content.items()
    )


def _choose(
    candidates: Mapping[tuple[str, ...], Mapping[str, Any]], key: str | None, names: Any, content: Any
) -> tuple[str, ...]:
    """Choose the state_dict asked for, the only one, the only one that fits the names, or that under a usual key."""
    listing = ", ".join(f"`{'.'.join(keys)}`" for keys in list(candidates)[:8]) + (", …" if len(candidates) > 8 else "")
    if key is not None:
        for keys in candidates:
            if ".".join(keys) == key:
                return keys
        raise Refusal(f"it has no state_dict under `{key}`. " + (f"It has {listing}." if listing else "It has none."))
    if not candidates and (record := record_in(content)):
        raise Refusal(
            f"no state_dict was found in it, but a pickled `{record}`, which is not loaded. Save model.state_dict(). "
            "Of a module, say what makes it with --model (make_model=), and which it is with --key (key=) if there are "
            "several; or pass --trust (trust=True), which runs the file's code."
        )
    if not candidates:
        what = f"a {type(content).__name__}"
        if isinstance(content, Mapping):
            what += " with " + (", ".join(f"`{name}`" for name in list(content)[:8]) or "nothing in it")
        raise Refusal(f"no state_dict was found in it: it holds {what}. Save model.state_dict().")
    left = list(candidates)
    if names is not None:
        left = [keys for keys in left if _fits(candidates[keys], names)] or left
    if len(left) > 1:
        left = [keys for keys in left if keys and keys[-1] in _USUAL] or left
    if len(left) > 1:
        raise Refusal(f"it has several state_dicts: {listing}. Choose one with --key (key=).")
    return left[0]


def _fits(found: Mapping[str, Any], names: Collection[str]) -> bool:
    prefix = prefix_by_names(found, names)
    return all(prefix + name in found for name in names if not name.endswith(COUNT))


def place_of(tensor: Any) -> tuple[Any, ...] | None:
    """Return what the names of one tied parameter have in common; None for what takes no place in memory."""
    if not is_dense(tensor) or tensor.numel() == 0:
        return None
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride()


def _replaced(content: Any, keys: tuple[str, ...], value: Any) -> Any:
    """Return a copy of nested mappings in which ``value`` stands under ``keys``."""
    if not keys:
        return value
    result = copy.copy(content)
    result[keys[0]] = _replaced(content.get(keys[0], {}), keys[1:], value)
    return result
