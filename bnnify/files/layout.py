"""Where a state_dict stands in a checkpoint, and how to put one back there."""

__all__ = ["Layout", "find", "has_state_dict", "put_back", "without_wrappers"]

import copy
import re
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .archive import Refusal
from .records import record_in

# The names of what wraps a model, as its parameters' names begin with them.
_WRAPPERS = ("module.", "_orig_mod.", "model.")
# Which of several state_dicts is the model's. They are never needed where there is one.
_USUAL = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params", "module")
_MAX_DEPTH = 6
_COUNT = "num_batches_tracked"
_KINDS = ("torch", "torch-legacy", "safetensors")


@dataclass(frozen=True)
class Layout:
    """How a file held its weights.

    Attributes:
        kind: ``"torch"`` (the zip format), ``"torch-legacy"`` or ``"safetensors"``.
        keys: Under which keys of nested mappings the state_dict stood; ``()`` if it was the whole file.
        prefix: What was removed from the beginning of each name, such as ``"module."``.
        names: The names that the file had, without the prefix, in their order. A model may have more: other names of a
            tied parameter, or counts of batches that an old file lacks.
    """

    kind: str
    keys: tuple[str, ...] = ()
    prefix: str = ""
    names: tuple[str, ...] = ()

    def as_data(self) -> dict[str, Any]:
        """The layout as plain data."""
        return {"kind": self.kind, "keys": list(self.keys), "prefix": self.prefix, "names": list(self.names)}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> "Layout":
        """The layout that gave ``data``.

        Raises:
            CheckpointError: Nothing of this version could have given it.
        """
        kind, keys, prefix, names = (data.get(field) for field in ("kind", "keys", "prefix", "names"))
        lists_of_text = all(isinstance(x, list) and all(isinstance(y, str) for y in x) for x in (keys, names))
        if kind not in _KINDS or not isinstance(prefix, str) or not lists_of_text:
            raise CheckpointError("The record of the original file's layout is damaged. Convert the checkpoint again.")
        return cls(kind, tuple(keys or ()), prefix, tuple(names or ()))


def find(
    content: Any, kind: str, key: str | None, names: Collection[str] | None
) -> tuple[dict[str, Tensor], Layout, Any]:
    """The state_dict in what a file held, its layout, and the rest of the content.

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
    prefix = _prefix_by_names(found, names) if names is not None else _common_prefix(found, content)
    state_dict = _within(found, prefix)
    taken = {prefix + name for name in state_dict}
    others = {name: value for name, value in found.items() if name not in taken}
    return state_dict, Layout(kind, keys, prefix, tuple(state_dict)), _replaced(content, keys, others)


def _within(found: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The weights whose names begin with ``prefix``, without it, and the versions of the modules there."""
    state_dict: dict[str, Any] = OrderedDict(
        (name[len(prefix) :], value.detach() if isinstance(value, Tensor) else value)
        for name, value in found.items()
        if name.startswith(prefix) and _can_be_taken(name, value)
    )
    metadata = getattr(found, "_metadata", None)
    if metadata is not None:
        # The metadata has the modules' names: `module` for the prefix `module.`.
        state_dict._metadata = OrderedDict(  # type: ignore[attr-defined]
            (f"{name}.".removeprefix(prefix).removesuffix(".") if name else "", value)
            for name, value in metadata.items()
            if f"{name}.".startswith(prefix) and _is_metadata(name, value)
        )
    return state_dict


def has_state_dict(content: Any) -> bool:
    """Whether there is a mapping of names to tensors in ``content``."""
    return next(_candidates(content), None) is not None


def put_back(layout: Layout, state_dict: Mapping[str, Any], rest: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`find` found ``state_dict`` in: the reverse of it."""
    added = [name for name in state_dict if name not in set(layout.names) and not name.endswith(_COUNT)]
    names = [name for name in layout.names if name in state_dict]
    given = {_place(state_dict[name]) for name in names}
    for name in added:
        if (place := _place(state_dict[name])) not in given:  # else it is another name of a tied parameter
            names.append(name)
            given.add(place)
    others: Any = rest
    for key in layout.keys:
        others = others.get(key, {})
    whole: dict[str, Any] = OrderedDict((layout.prefix + name, state_dict[name]) for name in names)
    whole.update(others)
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is not None:
        wrapper = {"": {"version": 1}} if layout.prefix else {}
        names_of_modules = {(layout.prefix + name).removesuffix("."): value for name, value in metadata.items()}
        whole._metadata = OrderedDict(wrapper | names_of_modules)  # type: ignore[attr-defined]
    return _replaced(rest, layout.keys, whole)


def _candidates(
    content: Any, path: tuple[str, ...] = (), seen: set[int] | None = None
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Each mapping of names to tensors that is reached through mappings with names as keys."""
    # A few mappings that hold each other a thousand times have more paths than can be walked.
    seen = set() if seen is None else seen
    if id(content) in seen or not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        return
    seen.add(id(content))
    values = content.items()
    if any(map(_is_dense, content.values())) and all(_is_weight(*item) for item in values):
        yield path, content
    elif len(path) < _MAX_DEPTH:
        for name, value in values:
            yield from _candidates(value, (*path, name), seen)


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided


def _is_weight(name: str, value: Any) -> bool:
    return isinstance(value, Tensor) or name.rpartition(".")[2] == "_extra_state"


def _can_be_taken(name: str, value: Any) -> bool:
    return _is_weight(name, value) and record_in(value) is None


def _is_metadata(name: Any, value: Any) -> bool:
    """Whether load_state_dict can do with it: it compares versions without a look at what they are."""
    return (
        isinstance(name, str)
        and isinstance(value, dict)
        and isinstance(value.get("version"), int | None)
        and all(isinstance(field, str) for field in value)
    )


def _is_mixed(content: Any) -> bool:
    """Whether the weights stand beside the epoch and the like, in one mapping."""
    return isinstance(content, Mapping) and any(
        isinstance(name, str) and "." in name and isinstance(value, Tensor) for name, value in content.items()
    )


def _choose(
    candidates: Mapping[tuple[str, ...], Mapping[str, Any]], key: str | None, names: Any, content: Any
) -> tuple[str, ...]:
    """Which state_dict is meant: the one asked for, the only one, the only one that fits the names, or the only one
    under a usual key."""
    listing = ", ".join(f"`{'.'.join(keys)}`" for keys in list(candidates)[:8]) + (", …" if len(candidates) > 8 else "")
    if key is not None:
        for keys in candidates:
            if ".".join(keys) == key:
                return keys
        raise Refusal(f"it has no state_dict under `{key}`. " + (f"It has {listing}." if listing else "It has none."))
    if not candidates and (record := record_in(content)):
        raise Refusal(
            f"no state_dict was found in it, but a pickled `{record}`, which is not loaded. Save model.state_dict(); "
            "for a module of an unknown class, say what makes it (--model, make_model=) and choose it with --key (key=) "
            "if there are several; or pass --trust (trust=True), which runs the file's code."
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
    prefix = _prefix_by_names(found, names)
    return all(prefix + name in found for name in names if not name.endswith(_COUNT))


def _prefix_by_names(found: Mapping[str, Any], names: Collection[str]) -> str:
    """The prefix under which most of ``names`` are there."""
    counts: Counter[str] = Counter()
    own = set(names)
    for name in found:
        starts = [0] + [match.end() for match, _ in zip(re.finditer(r"\.", name), range(32), strict=False)]
        counts.update(name[:start] for start in starts if name[start:] in own)
    return min(counts, key=lambda prefix: (-counts[prefix], len(prefix)), default="")


def without_wrappers(state_dict: Mapping[str, Any], names: Collection[str]) -> Mapping[str, Any]:
    """``state_dict`` without the prefixes of wrappers that all of its names begin with, and none of ``names``."""
    prefix = _common_prefix(state_dict, None, names)
    return _within(state_dict, prefix) if prefix else state_dict


def _common_prefix(found: Mapping[str, Any], content: Any, own: Collection[str] = ()) -> str:
    """The wrappers that every name begins with, and none of the model's ``own``.

    In a Lightning checkpoint one of them is the attribute of the LightningModule that is the model, whatever its name;
    losses and metrics may stand beside it.
    """
    lightning = isinstance(content, Mapping) and "pytorch-lightning_version" in content
    prefix = ""
    for _ in range(_MAX_DEPTH):
        wrappers = [wrapper for wrapper in _WRAPPERS if not any(name.startswith(wrapper) for name in own)]
        longer = next((prefix + w for w in wrappers if all(_is_below(prefix + w, name) for name in found)), None)
        if longer is None and lightning:
            longer, lightning = _prefix_of_matrices(found, prefix), False
        if longer is None:
            break
        prefix = longer
    return prefix


def _is_below(prefix: str, name: str) -> bool:
    return name.startswith(prefix) and name != prefix


def _prefix_of_matrices(found: Mapping[str, Any], prefix: str) -> str | None:
    """``model.`` if there is one, else the one attribute under which everything is that has two dimensions or more."""
    if any(_is_below(prefix + "model.", name) for name in found):
        return prefix + "model."
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor) and value.ndim > 1}
    attributes = {name[len(prefix) :].partition(".")[:2] for name in tensors}
    attribute, dot = attributes.pop() if len(attributes) == 1 else ("", "")
    return f"{prefix}{attribute}." if dot else None


def _place(tensor: Any) -> Any:
    """What two names of one tied parameter have in common."""
    if not _is_dense(tensor) or tensor.numel() == 0:
        return object()
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride()


def _replaced(content: Any, keys: tuple[str, ...], value: Any) -> Any:
    """A copy of nested mappings in which ``value`` stands under ``keys``."""
    if not keys:
        return value
    result = copy.copy(content)
    result[keys[0]] = _replaced(content.get(keys[0], {}), keys[1:], value)
    return result
