"""Read the files of bnnify: a state_dict and a record of plain data."""

__all__ = ["FLOAT_FORMAT", "FORMAT", "open_posterior", "own_record", "posterior_parts", "weights_in"]

import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..distributions.gaussian import dtype_of_rho
from ..draws.companions import INITIAL_STD, PRIOR_MEAN, PRIOR_STD
from ..errors import BnnifyError, CheckpointError
from ..version import __version__
from .architectures.recipe import Recipe
from .architectures.shapes import abridged, printable
from .decisions_data import decisions_from_data
from .foreign.formats import SAFETENSORS_METADATA
from .foreign.layout import Layout
from .foreign.read_write import Checkpoint, is_sharded, read, read_shards
from .int8 import PACKED_ENDINGS, unpack
from .posterior_file import Origin, PosteriorFile
from .settings_data import initial_std_from_data, settings_from_data

FORMAT, FLOAT_FORMAT = 6, 5
"""The format of files in int8, and that of all others, which the release before reads too. Format 1 had neither the
model nor where its weights came from; up to format 2 the scale of a prior stood among the settings, and not among the
tensors; up to format 3 a point posterior was the estimator "point"; up to format 4 no model had an adapter, and ρ had
the dtype of the weights.
"""


def open_posterior(path: str | os.PathLike[str]) -> PosteriorFile:
    """Read a file that :func:`save` wrote, as it stands there.

    Raises:
        CheckpointError: The file cannot be read, is not bnnify's, or is of a newer format.
    """
    checkpoint = _read_own(path)
    return _posterior_file(path, _record_of(path, checkpoint), checkpoint.state_dict)


def posterior_parts(path: str | os.PathLike[str]) -> Iterator[PosteriorFile]:
    """Read a file that :func:`save` wrote in parts, so that no more than one need be in memory.

    Each shard is a part, with the whole of the parameters in it. A file without shards is one part.

    Raises:
        CheckpointError: As :func:`open_posterior`.
    """
    if not is_sharded(path):
        yield open_posterior(path)
        return
    missing: set[str] | None = None
    for shard in read_shards(path):
        record = _record_of(path, shard)
        part = _posterior_file(path, _of_those_in(shard.state_dict, record), shard.state_dict)
        missing = ({*record["settings"]} if missing is None else missing) - part.settings.keys()
        yield part
    if missing:
        raise _damaged(path, f"its shards lack {abridged(map(printable, sorted(missing)))}")


def _posterior_file(
    path: str | os.PathLike[str], record: Mapping[str, Any], state_dict: dict[str, Tensor]
) -> PosteriorFile:
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
            state_dict[alias] = state_dict[name]
        errors = record.get("int8") or {}
        unpack(state_dict, settings, errors)
        for name, data in record["settings"].items():
            known = initial_std_from_data(data)
            if known is not None and settings[name].prior.needs_initial_std:
                state_dict[name + INITIAL_STD] = known
        history = [dict(entry) for entry in record.get("history") or ()]  # files of earlier releases have none
        decisions = decisions_from_data(record.get("decisions") or {})
        file = PosteriorFile(path, state_dict, settings, origin, errors, history, decisions)
        _check_tensors(file)
    except (AttributeError, KeyError, TypeError, ValueError, BnnifyError) as error:
        raise _damaged(path, f"{type(error).__name__}: {str(error).rstrip('.')}") from error
    return file


def _of_those_in(shard: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of those parameters alone that stand in ``shard``."""
    fields: dict[str, Any] = {name: record.get(name) or {} for name in ("aliases", "settings", "int8")}
    if not all(isinstance(value, Mapping) for value in fields.values()):
        return dict(record)  # which is damaged
    aliases = {alias: name for alias, name in fields["aliases"].items() if name in shard}
    there = {name.removesuffix(PACKED_ENDINGS[0]) for name in (*shard, *aliases)}
    of_shard = {field: {n: value for n, value in fields[field].items() if n in there} for field in ("settings", "int8")}
    return {**record, **of_shard, "aliases": aliases}


def _record_of(path: str | os.PathLike[str], checkpoint: Checkpoint) -> Mapping[str, Any]:
    record = own_record(checkpoint)
    if record is None:
        raise _not_ours(path)
    _check_format(path, record)
    return record


def weights_in(path: str | os.PathLike[str], names: Collection[str]) -> Mapping[str, Tensor]:
    """Read the tensors of a file, whether it is bnnify's, with all that is Bayesian, or anybody's.

    ``names`` are those of the model, as in :func:`~bnnify.checkpoints.foreign.read_write.read`.
    """
    checkpoint = read(path, names=names)
    return checkpoint.state_dict if own_record(checkpoint) is None else open_posterior(path).state_dict


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
        raise _damaged(path, "it has no format number")
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
        whole = is_sharded(path) or Path(path).suffix == ".safetensors"
        return read(path, key=None if whole else "state_dict", names=())
    except CheckpointError:
        read(path, names=())  # which says it better if the file cannot be read at all
        raise _not_ours(path) from None


def _damaged(path: str | os.PathLike[str], how: str) -> CheckpointError:
    return CheckpointError(f"`{path}` is damaged: {how}. Convert the model again.")


def _not_ours(path: str | os.PathLike[str]) -> CheckpointError:
    return CheckpointError(
        f"`{path}` was not written by bnnify. Convert it first, with `bnnify-cli convert` or bnnify.convert."
    )
