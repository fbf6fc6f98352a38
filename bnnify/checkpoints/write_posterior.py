"""Write the files of bnnify: a state_dict and a record of plain data."""

__all__ = ["write_posterior"]

import copy
import json
import os
import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..decisions import Decision
from ..draws.companions import INITIAL_STD, OF_PRIOR, RHO
from ..errors import CheckpointError
from ..modules.settings import Settings
from ..version import __version__
from .architectures.shapes import abridged, printable
from .atomic import replace_atomically
from .decisions_data import decisions_as_data
from .foreign.explained import explained
from .foreign.formats import import_safetensors
from .foreign.layout import is_dense, place_of
from .foreign.read_write import read
from .foreign.shards import write_shards
from .int8 import PACKED_ENDINGS, pack
from .own_format import FLOAT_FORMAT, FORMAT
from .posterior_file import Origin
from .settings_data import settings_as_data


def write_posterior(
    path: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor],
    settings: Mapping[str, Settings],
    origin: Origin,
    dtype: str | None = None,
    *,
    history: Sequence[Mapping[str, Any]] = (),
    decisions: Mapping[str, Decision] = MappingProxyType({}),
    max_shard_size: int | None = None,
) -> None:
    """Write one of bnnify's own files, in the dtypes of the tensors or in int8, or a folder of shards."""
    record: dict[str, Any] = {"bnnify": __version__, "torch": str(torch.__version__)}
    record |= {
        "format": FLOAT_FORMAT if dtype is None else FORMAT,
        "settings": settings_as_data(settings),
        "recipe": None if origin.recipe is None else origin.recipe.as_data(),
        "config": None if origin.config is None else dict(origin.config),
        "adapter": None if origin.adapter is None else dict(origin.adapter),
        "layout": None if origin.layout is None else origin.layout.as_data(),
        "rest": dict(origin.rest),
        "history": list(history),
        "decisions": decisions_as_data(decisions),
    }
    if dtype is not None:
        state_dict, record["int8"] = pack(state_dict, settings)
    if max_shard_size is not None or Path(path).suffix == ".safetensors":
        _write_safetensors(path, state_dict, record, settings, max_shard_size)
        return
    state_dict = _with_whole_companions(state_dict, settings)
    with replace_atomically(path) as file:
        try:
            torch.save({"state_dict": state_dict, "bnnify": record}, file)
        except (AttributeError, NotImplementedError, TypeError, pickle.PicklingError) as error:
            raise CheckpointError(
                f"Cannot write `{path}`: the model's state_dict holds what cannot be pickled ({error}). Keep it out of "
                "the state_dict."
            ) from error
        file.flush()
        _check_readable(path, file.name, state_dict)


def _with_whole_companions(state_dict: Mapping[str, Tensor], settings: Mapping[str, Settings]) -> Mapping[str, Tensor]:
    """Return ``state_dict`` with a number for each weight where one number was expanded to all."""
    made: Any = copy.copy(state_dict)  # unlike a new dict, with what torch notes about the versions of the modules
    whole: dict[Any, Tensor] = {}
    for name, each in settings.items():
        for key in (name + ending for ending in each.posterior.companions):
            if key in state_dict:  # in int8 it has other names
                made[key] = whole.setdefault(place_of(state_dict[key]) or key, state_dict[key].contiguous())
    return made


def _check_readable(path: str | os.PathLike[str], written: str, state_dict: Mapping[str, Any]) -> None:
    """Raise unless the file that was just written can be read again, with all of ``state_dict``."""
    try:
        found = read(written, key="state_dict", names=()).state_dict
        lost = abridged(printable(name) for name in state_dict if name not in found)
    except CheckpointError as error:
        lost = str(error).partition("`: ")[2].rstrip(".")
    if lost:
        raise CheckpointError(
            f"Cannot write `{path}`: the model's state_dict holds what could not be read again without running code "
            f"({lost}). Keep it out of the state_dict, or save bnn.module.state_dict() with torch.save."
        )


def _write_safetensors(
    path: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor],
    record: dict[str, Any],
    settings: Iterable[str],
    max_shard_size: int | None,
) -> None:
    if others := [printable(name) for name, value in state_dict.items() if not is_dense(value) or value.is_quantized]:
        raise CheckpointError(
            f"Cannot write `{path}`: a .safetensors file holds nothing but dense tensors and text, and the model has "
            f"{abridged(others)}. Choose a name that ends in .bnn.pt."
        )
    aliases = _aliases(state_dict)
    try:
        metadata = {"bnnify": json.dumps(record | {"aliases": aliases})}
    except TypeError as error:
        raise CheckpointError(
            f"Cannot write `{path}`: a .safetensors file holds nothing but tensors and text, and the checkpoint held "
            "more, such as the state of an optimizer. Choose a name that ends in .bnn.pt."
        ) from error
    tensors = {name: tensor.detach() for name, tensor in state_dict.items() if name not in aliases}

    def dense(names: Iterable[str]) -> dict[str, Tensor]:
        return {name: tensors[name].cpu().contiguous() for name in names}

    if max_shard_size is not None:
        plan = _split(tensors, settings, max_shard_size)
        write_shards(path, map(dense, plan), len(plan), metadata=metadata)
        return
    with explained(Path(path), "write"), replace_atomically(path) as file:
        import_safetensors().torch.save_file(dense(tensors), file.name, metadata)


def _split(tensors: Mapping[str, Tensor], settings: Iterable[str], max_size: int) -> list[list[str]]:
    """Share the names out among shards of at most ``max_size`` bytes, in their order.

    What belongs to one parameter stays together, so that each shard can be understood by itself; what is larger has a
    shard of its own.
    """
    owners = {name + ending: name for name in settings for ending in (RHO, *OF_PRIOR, INITIAL_STD, *PACKED_ENDINGS)}
    groups: dict[str, list[str]] = {}
    for name in tensors:
        groups.setdefault(owners.get(name, name), []).append(name)
    shards, left = list[list[str]](), 0
    for names in groups.values():
        size = sum(tensors[name].nbytes for name in names)
        if size > left or not shards:
            shards.append([])
            left = max_size
        shards[-1] += names
        left -= size
    return shards


def _aliases(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """Map each further name of a tied parameter to the first one: a safetensors file has every tensor once."""
    first_names: dict[Any, str] = {}
    aliases = {}
    for name, tensor in state_dict.items():
        place = place_of(tensor) or name
        if place in first_names:
            aliases[name] = first_names[place]
        else:
            first_names[place] = name
    return aliases
