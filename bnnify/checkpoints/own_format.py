"""What one of bnnify's own files holds: tensors and, as plain data, how the model they belong to is Bayesian."""

__all__ = ["Origin", "PosteriorFile", "open_posterior", "write_posterior"]

import copy
import json
import math
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..distributions.gaussian import has_pruned
from ..draws.companions import INITIAL_STD, PRIOR_MEAN, RHO, PriorMean
from ..errors import BnnifyError, CheckpointError
from ..model import BayesianModel
from ..modules.becoming import NewPosterior, become_bayesian
from ..modules.parameters import companions_of
from ..modules.settings import PosteriorState, Settings
from .architectures.recipe import Recipe
from .architectures.shapes import abridged, printable
from .atomic import replace_atomically
from .foreign.formats import import_safetensors
from .foreign.layout import Layout
from .foreign.read_write import Checkpoint, read
from .settings_data import initial_std_from_data, settings_as_data, settings_from_data

FORMAT = 4
"""The format of the files that are written. Format 1 had neither the model nor where its weights came from; up to
format 2 the scale of a prior stood among the settings, and not among the tensors; up to format 3 a point posterior was
the estimator "point".
"""


@dataclass(frozen=True)
class Origin:
    """Where the weights of a converted model came from, so that a file of the same kind can be given back.

    Attributes:
        recipe: How to make the model again; None where only its author can.
        config: The ``config.json`` of a Hugging Face model, from which transformers makes it.
        layout: How the file was laid out that held the weights.
        rest: What else that file held, such as the state of an optimizer.
        notes: What the user should know of how the file was read; not written to files.
    """

    recipe: Recipe | None = None
    config: Mapping[str, Any] | None = None
    layout: Layout | None = None
    rest: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PosteriorFile:
    """What a file of bnnify's holds.

    Attributes:
        path: The file.
        state_dict: The original names plus ``*_rho``, ``*_prior_mean`` and ``*_initial_std``.
        settings: How each Bayesian parameter is Bayesian, by name.
        origin: Where the weights came from.
    """

    path: str | os.PathLike[str]
    state_dict: dict[str, Tensor]
    settings: dict[str, Settings]
    origin: Origin

    @property
    def plain_state_dict(self) -> dict[str, Tensor]:
        """The posterior means and everything that is not Bayesian, under the original names."""
        derived = {name + ending for name, each in self.settings.items() for ending in companions_of(each)}
        plain = copy.copy(self.state_dict)  # unlike a new dict, with what torch notes about the versions of the modules
        for name in derived & plain.keys():
            del plain[name]
        return plain

    def parameters_alone(self) -> BayesianModel:
        """The Bayesian parameters in modules without a forward, for what needs no architecture.

        They share their values with :attr:`state_dict`: pruning the one prunes the other. A prior mean that shares its
        memory with the mean, as in a file that the command wrote, is copied there.
        """
        root, shared = nn.Module(), dict[tuple[Any, ...], nn.Parameter]()
        for name in self.settings:
            prior_mean = self.state_dict.get(name + PRIOR_MEAN)
            if prior_mean is not None and _place(prior_mean) == _place(self.state_dict[name]):
                self.state_dict[name + PRIOR_MEAN] = prior_mean.clone()

        def parameter(name: str) -> nn.Parameter | None:
            tensor = self.state_dict.get(name)
            if tensor is None:
                return None
            return shared.setdefault(_place(tensor) or (name,), nn.Parameter(tensor, requires_grad=False))

        posteriors: dict[nn.Module, dict[str, NewPosterior]] = {}
        for name, settings in self.settings.items():
            module = root
            *path, attribute = name.split(".")
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]  # type: ignore[assignment]
            module.register_parameter(attribute, parameter(name))
            found = {ending: parameter(name + ending) for ending in settings.posterior.companions}
            companions = {ending: value for ending, value in found.items() if value is not None}
            prior_mean = parameter(name + PRIOR_MEAN)
            initial_std = self.state_dict.get(name + INITIAL_STD, torch.tensor([math.nan]))
            posteriors.setdefault(module, {})[attribute] = NewPosterior(
                settings,
                companions,
                None if prior_mean is None else PriorMean(prior_mean.data),
                initial_std if settings.prior.needs_initial_std else None,
                PosteriorState(RHO in companions and has_pruned(companions[RHO])),
            )
        for module, new in posteriors.items():
            become_bayesian(module, new)
        return BayesianModel(root)


def write_posterior(
    path: str | os.PathLike[str], state_dict: Mapping[str, Tensor], settings: Mapping[str, Settings], origin: Origin
) -> None:
    """Write one of bnnify's own files."""
    record: dict[str, Any] = {"format": FORMAT, "bnnify": version("bnnify"), "torch": str(torch.__version__)}
    record |= {
        "settings": settings_as_data(settings),
        "recipe": None if origin.recipe is None else origin.recipe.as_data(),
        "config": None if origin.config is None else dict(origin.config),
        "layout": None if origin.layout is None else origin.layout.as_data(),
        "rest": dict(origin.rest),
    }
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
    foreign = _read_own(path)
    record = foreign.rest.get("bnnify")
    if not isinstance(record, Mapping):
        record = _parsed(path, foreign.rest.get("__metadata__", {}).get("bnnify"))
    _check_format(path, record)
    try:
        settings = {name: settings_from_data(data) for name, data in record["settings"].items()}
        origin = Origin(
            _optional(Recipe.from_data, record.get("recipe")),
            _optional(dict, record.get("config")),
            _optional(Layout.from_data, record.get("layout")),
            record.get("rest") or {},
        )
        for alias, name in (record.get("aliases") or {}).items():
            foreign.state_dict[alias] = foreign.state_dict[name]
        for name, data in record["settings"].items():
            known = initial_std_from_data(data)
            if known is not None and settings[name].prior.needs_initial_std:
                foreign.state_dict[name + INITIAL_STD] = known
        file = PosteriorFile(path, foreign.state_dict, settings, origin)
        _check_tensors(file)
    except (AttributeError, KeyError, TypeError, ValueError, BnnifyError) as error:
        raise CheckpointError(
            f"`{path}` is damaged: {type(error).__name__}: {error}. Convert the model again."
        ) from error
    return file


def _check_format(path: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    written = record.get("format")
    if not isinstance(written, int) or written < 1:
        raise CheckpointError(f"`{path}` is damaged: it has no format number. Convert the model again.")
    if written > FORMAT:
        from packaging.version import InvalidVersion, Version

        try:
            newer = Version(str(record.get("bnnify"))) > Version(version("bnnify"))
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
        for key in (name, *wanted):
            if _kind(file.state_dict.get(key)) != _kind(file.state_dict.get(name)) or name not in file.state_dict:
                raise ValueError(f"`{key}` is missing, or its shape or dtype is not that of `{name}`")
        initial_std = file.state_dict.get(name + INITIAL_STD)
        if initial_std is not None and not (initial_std.is_floating_point() and initial_std.shape == (1,)):
            raise ValueError(f"`{name}{INITIAL_STD}` is not one number")


def _kind(tensor: Any) -> Any:
    return (tensor.shape, tensor.dtype) if isinstance(tensor, Tensor) and tensor.is_floating_point() else None


def _optional(make: Callable[[Any], Any], data: Any) -> Any:
    return None if data is None else make(data)


def _read_own(path: str | os.PathLike[str]) -> Checkpoint:
    """The content of a file under the names that it has; what it kept of another file may hold state_dicts too."""
    try:
        return read(path, key=None if Path(path).suffix == ".safetensors" else "state_dict", names=())
    except CheckpointError:
        read(path, names=())  # which says it better if the file cannot be read at all
        raise _not_ours(path) from None


def _parsed(path: str | os.PathLike[str], record: Any) -> Mapping[str, Any]:
    """The record in the metadata of a safetensors file."""
    if record is None:
        raise _not_ours(path)
    try:
        parsed = json.loads(record)
    except (TypeError, ValueError):
        parsed = None
    if not isinstance(parsed, Mapping):
        raise CheckpointError(f"`{path}` is damaged: its record is not a JSON object. Convert the model again.")
    return parsed


def _not_ours(path: str | os.PathLike[str]) -> CheckpointError:
    return CheckpointError(
        f"`{path}` was not written by bnnify. Convert it first, with `bnnify-cli convert` or bnnify.convert."
    )


def _write_safetensors(path: str | os.PathLike[str], state_dict: Mapping[str, Tensor], record: dict[str, Any]) -> None:
    if others := [printable(name) for name, value in state_dict.items() if not _is_dense(value)]:
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
    """For each further name of a tied parameter, the first one: a safetensors file has every tensor once."""
    first: dict[Any, str] = {}
    for name, tensor in state_dict.items():
        first.setdefault(_place(tensor) or name, name)
    heads = {name: first[_place(tensor) or name] for name, tensor in state_dict.items()}
    return {name: head for name, head in heads.items() if name != head}


def _place(tensor: Tensor) -> tuple[Any, ...] | None:
    """What two names of one tied parameter have in common; None for a tensor that takes no place."""
    return (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else None


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized
