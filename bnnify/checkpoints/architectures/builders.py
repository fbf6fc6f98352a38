"""The builders of torchvision and timm: their names, what they begin with, and their families."""

__all__ = ["builders", "families", "library_named", "likely_builders"]

import functools
import importlib
import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Collection
from typing import Any

from ...errors import CheckpointError


@functools.cache
def builders(library: str) -> tuple[str, ...]:
    """Name a library's models. The quantized ones of torchvision hold no float weights and are left out.

    Raises:
        CheckpointError: The library is not installed.
    """
    names = library_named(library)[0].list_models()
    return tuple(name for name in names if library != "torchvision" or not name.startswith("quantized_"))


def likely_builders(library: str, names: Collection[str]) -> tuple[str, ...]:
    """Name the library's builders, without those of timm whose first layer is not among ``names``, of a state_dict."""
    if library != "timm":
        return builders(library)
    firsts = _first_layers().items()
    return tuple(builder for builder, first in firsts if not first or any(f"{name}.weight" in names for name in first))


@functools.cache
def _first_layers() -> dict[str, tuple[str, ...]]:
    """Name the first layers of each of timm's models, as far as timm says."""
    timm, layers = library_named("timm")[0], {}
    for builder in builders("timm"):
        first = getattr(timm.models.get_pretrained_cfg(builder), "first_conv", None) or ()
        layers[builder] = (first,) if isinstance(first, str) else tuple(first)
    return layers


def families(library: str, names: Collection[str]) -> dict[tuple[str, ...], frozenset[str]]:
    """Group the likely builders by the module that defines them; map each group to the words in that module's source.

    The attributes of a family's models are among these words: a look at the source costs less than making a model. In
    torchvision a family has one kind of backbone, whose names a model takes over.
    """
    root, members = library_named(library)[0], defaultdict(list)
    find = root.model_entrypoint if library == "timm" else root.get_model_builder
    for builder in likely_builders(library, names):
        members[find(builder).__module__, "mobilenet" in builder].append(builder)
    return {tuple(family): _words_of(module) for (module, _), family in members.items()}


@functools.cache
def _words_of(module: str) -> frozenset[str]:
    try:
        source = inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):  # a library may be installed without its sources
        return frozenset()
    return frozenset(re.findall(r"[A-Za-z_]\w*", source))


def library_named(name: str) -> tuple[Any, str]:
    """Return the module with a library's models, and the library's version."""
    try:
        root = importlib.import_module(name)
        return (importlib.import_module("torchvision.models") if name == "torchvision" else root), root.__version__
    except Exception as error:  # not only ImportError: a build for another torch fails with a RuntimeError
        raise CheckpointError(
            f"{name} has the model's builder and cannot be imported: {str(error).rstrip('.')}."
        ) from error
