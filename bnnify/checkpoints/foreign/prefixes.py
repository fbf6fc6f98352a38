"""Find the prefix with which the names of a state_dict begin, and remove it."""

__all__ = ["common_prefix", "is_weight", "prefix_by_names", "within", "without_wrappers"]

import re
from collections import Counter, OrderedDict
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from ...torch_internals import module_versions, set_module_versions
from .records import record_in

# The names of what wraps a model, as its parameters' names begin with them.
_WRAPPERS = ("module.", "_orig_mod.", "model.")
_MAX_WRAPPERS = 6


def prefix_by_names(found: Mapping[str, Any], names: Collection[str]) -> str:
    """Find the prefix under which most of ``names`` are there."""
    counts: Counter[str] = Counter()
    own = set(names)
    for name in found:
        starts = [0] + [match.end() for match, _ in zip(re.finditer(r"\.", name), range(32), strict=False)]
        counts.update(name[:start] for start in starts if name[start:] in own)
    return min(counts, key=lambda prefix: (-counts[prefix], len(prefix)), default="")


def without_wrappers(state_dict: Mapping[str, Any], names: Collection[str]) -> Mapping[str, Any]:
    """Remove the prefixes of wrappers, as long as all names begin with one and none is among the model's ``names``."""
    prefix = common_prefix(state_dict, None, names)
    return within(state_dict, prefix) if prefix else state_dict


def common_prefix(found: Mapping[str, Any], content: Any, own: Collection[str] = ()) -> str:
    """Find the wrappers that every name begins with, up to where one of the model's ``own`` names is found.

    In a Lightning checkpoint one of them is the attribute of the LightningModule that is the model, whatever its name;
    losses and metrics may stand beside it.
    """
    lightning = isinstance(content, Mapping) and "pytorch-lightning_version" in content
    prefix = ""
    for _ in range(_MAX_WRAPPERS):
        names = [name for name in found if name.startswith(prefix)]
        longer = next((prefix + w for w in _WRAPPERS if all(_is_below(prefix + w, name) for name in names)), None)
        if longer is None and lightning:
            longer, lightning = _prefix_of_matrices(found, prefix), False
        if longer is None or any(prefix + name in found for name in own):
            break
        prefix = longer
    return prefix


def _is_below(prefix: str, name: str) -> bool:
    return name.startswith(prefix) and name != prefix


def _prefix_of_matrices(found: Mapping[str, Any], prefix: str) -> str | None:
    """Return ``model.`` if there is one, else the one attribute under which all matrices and kernels are."""
    if any(_is_below(prefix + "model.", name) for name in found):
        return prefix + "model."
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor) and value.ndim > 1}
    attributes = {name[len(prefix) :].partition(".")[:2] for name in tensors}
    attribute, dot = attributes.pop() if len(attributes) == 1 else ("", "")
    return f"{prefix}{attribute}." if dot else None


def within(found: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the weights whose names begin with ``prefix``, without it, and the versions of the modules there."""
    state_dict: dict[str, Any] = OrderedDict(
        (name[len(prefix) :], value.detach() if isinstance(value, Tensor) else value)
        for name, value in found.items()
        if name.startswith(prefix) and is_weight(name, value) and record_in(value) is None
    )
    versions = module_versions(found)
    if versions is not None:
        # They stand under the modules' names: `module` for the prefix `module.`.
        renamed = (
            (f"{name}.".removeprefix(prefix).removesuffix(".") if name else "", value)
            for name, value in versions.items()
            if f"{name}.".startswith(prefix) and _is_version(name, value)
        )
        set_module_versions(state_dict, OrderedDict(renamed))
    return state_dict


def is_weight(name: str, value: Any) -> bool:
    return isinstance(value, Tensor) or name.rpartition(".")[2] == "_extra_state"


def _is_version(name: Any, value: Any) -> bool:
    """Tell whether load_state_dict can do with it: it compares versions without a look at what they are."""
    return (
        isinstance(name, str)
        and isinstance(value, dict)
        and isinstance(value.get("version"), int | None)
        and all(isinstance(field, str) for field in value)
    )
