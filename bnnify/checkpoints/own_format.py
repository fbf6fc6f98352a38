"""Write and read the files of bnnify: a state_dict and a record of plain data."""

__all__ = ["open_posterior", "own_record", "write_posterior"]

import json
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..decisions import Decision
from ..distributions.gaussian import dtype_of_rho
from ..draws.companions import INITIAL_STD, PRIOR_MEAN, PRIOR_STD
from ..errors import BnnifyError, CheckpointError
from ..modules.settings import Settings
from ..version import __version__
from .architectures.recipe import Recipe
from .architectures.shapes import abridged, printable
from .atomic import replace_atomically
from .decisions_data import decisions_as_data, decisions_from_data
from .foreign.formats import SAFETENSORS_METADATA, import_safetensors
from .foreign.layout import Layout, is_dense, place_of
from .foreign.read_write import Checkpoint, read
from .int8 import pack, unpack
from .posterior_file import Origin, PosteriorFile
from .settings_data import initial_std_from_data, settings_as_data, settings_from_data

FORMAT, FLOAT_FORMAT = 6, 5
"""The format of files in int8, and that of all others, which the release before reads too. Format 1 had neither the
model nor where its weights came from; up to format 2 the scale of a prior stood among the settings, and not among the
tensors; up to format 3 a point posterior was the estimator "point"; up to format 4 no model had an adapter, and ρ had
the dtype of the weights.
"""


def write_posterior(
    path: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor],
    settings: Mapping[str, Settings],
    origin: Origin,
    dtype: str | None = None,
    *,
    history: Sequence[Mapping[str, Any]] = (),
    decisions: Mapping[str, Decision] = MappingProxyType({}),
) -> None:
    """Write one of bnnify's own files, in the dtypes of the tensors or in int8."""
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
    if Path(path).suffix == ".safetensors":
        _write_safetensors(path, state_dict, record)
        return
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


def open_posterior(path: str | os.PathLike[str]) -> PosteriorFile:
    """Read a file that :func:`save` wrote, as it stands there.

    Raises:
        CheckpointError: The file cannot be read, is not bnnify's, or is of a newer format.
    """
    checkpoint = _read_own(path)
    record = own_record(checkpoint)
    if record is None:
        raise _not_ours(path)
    _check_format(path, record)
    try:
        settings = {name: settings_from_data(data) for name, data in record["settings"].items()}
        recipe, config, adapter, layout = (record.get(name) for name in ("recipe", "config", "adapter", "layout"))
        origin = Origin(
            None if recipe is None else Recipe.from_data(recipe),
            None if config is None else dict(config),
            None if layout is None else Layout.from_data(layout),
            record.get("rest") or {},
            adapter=None if adapter is None else dict(adapter),
        )
        for alias, name in (record.get("aliases") or {}).items():
            checkpoint.state_dict[alias] = checkpoint.state_dict[name]
        errors = record.get("int8") or {}
        unpack(checkpoint.state_dict, settings, errors)
        for name, data in record["settings"].items():
            known = initial_std_from_data(data)
            if known is not None and settings[name].prior.needs_initial_std:
                checkpoint.state_dict[name + INITIAL_STD] = known
        history = [dict(entry) for entry in record.get("history") or ()]  # files of earlier releases have none
        decisions = decisions_from_data(record.get("decisions") or {})
        file = PosteriorFile(path, checkpoint.state_dict, settings, origin, errors, history, decisions)
        _check_tensors(file)
    except (AttributeError, KeyError, TypeError, ValueError, BnnifyError) as error:
        raise CheckpointError(
            f"`{path}` is damaged: {type(error).__name__}: {str(error).rstrip('.')}. Convert the model again."
        ) from error
    return file


def own_record(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """Return the record that bnnify wrote beside the weights, as JSON in a safetensors file; None in other files."""
    record = checkpoint.rest.get("bnnify")
    if record is None:
        try:
            record = json.loads(checkpoint.rest[SAFETENSORS_METADATA]["bnnify"])
        except (KeyError, TypeError, ValueError, RecursionError):
            return None
    # Others may use the name as a key too, but not for a record that names the versions of both libraries.
    return record if isinstance(record, Mapping) and {"bnnify", "torch"} <= record.keys() else None


def _check_format(path: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    written = record.get("format")
    if not isinstance(written, int) or written < 1:
        raise CheckpointError(f"`{path}` is damaged: it has no format number. Convert the model again.")
    if written > FORMAT:
        from packaging.version import InvalidVersion, Version

        try:
            newer = Version(str(record.get("bnnify"))) > Version(__version__)
        except InvalidVersion:
            newer = False
        hint = f"Upgrade bnnify to {record['bnnify']} or newer." if newer else "Upgrade bnnify."
        raise CheckpointError(
            f"`{path}` has format {written}, written by bnnify {record.get('bnnify')}; this version reads up to "
            f"{FORMAT}. {hint}"
        )


def _check_tensors(file: PosteriorFile) -> None:
    """Raise unless each Bayesian parameter has what its settings say."""
    for name, settings in file.settings.items():
        wanted = [name + ending for ending in settings.posterior.companions]
        wanted += [name + PRIOR_MEAN] if settings.prior.centred else []
        wanted += [name + PRIOR_STD] if settings.prior.elementwise else []
        for key in (name, *wanted):
            if _kind(file.state_dict.get(key)) != _kind(file.state_dict.get(name)) or name not in file.state_dict:
                raise CheckpointError(f"`{key}` is missing, or its shape or dtype is not that of `{name}`")
        initial_std = file.state_dict.get(name + INITIAL_STD)
        if initial_std is not None and not (initial_std.is_floating_point() and initial_std.shape == (1,)):
            raise CheckpointError(f"`{name}{INITIAL_STD}` is not one number")


def _kind(tensor: Any) -> Any:
    """Return shape and dtype; half precision counts as float32, in which ρ is beside it since format 5."""
    is_float = isinstance(tensor, Tensor) and tensor.is_floating_point()
    return (tensor.shape, dtype_of_rho(tensor.dtype)) if is_float else None


def _read_own(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a file under the names that it has; what it kept of another file may hold state_dicts too."""
    try:
        return read(path, key=None if Path(path).suffix == ".safetensors" else "state_dict", names=())
    except CheckpointError:
        read(path, names=())  # which says it better if the file cannot be read at all
        raise _not_ours(path) from None


def _not_ours(path: str | os.PathLike[str]) -> CheckpointError:
    return CheckpointError(
        f"`{path}` was not written by bnnify. Convert it first, with `bnnify-cli convert` or bnnify.convert."
    )


def _write_safetensors(path: str | os.PathLike[str], state_dict: Mapping[str, Tensor], record: dict[str, Any]) -> None:
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
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items() if name not in aliases}
    content = import_safetensors().torch.save(tensors, metadata)
    with replace_atomically(path) as file:
        file.write(content)


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
