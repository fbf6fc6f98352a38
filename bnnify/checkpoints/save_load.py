"""Write a converted model into a file of bnnify's, and read it."""

__all__ = ["build_without_values", "load", "save", "without_values"]

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..convert import collapse, convert_with
from ..draws.companions import OF_PRIOR
from ..draws.sharding import is_distributed
from ..errors import (
    ArgumentError,
    ArgumentTypeError,
    CheckpointError,
    ConversionError,
    check_module,
    check_path,
    describe,
)
from ..model import BayesianModel
from ..modules.parameters import bayesian_parameters
from ..modules.refusals import is_quantized
from ..modules.settings import slots_of
from .architectures.lora_adapter import base_weights, with_adapter
from .architectures.shapes import abridged, printable
from .architectures.transformers_model import load_by_config
from .endings import check_ending
from .foreign.shards import as_bytes
from .gathered import gathered, written_by_one
from .int8 import DTYPES
from .load_weights import load_weights
from .own_format import open_posterior
from .posterior_file import Origin, PosteriorFile
from .settings_data import can_be_saved
from .tensor_places import valueless_buffers
from .write_posterior import write_posterior


def save(
    bnn: BayesianModel,
    path: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    max_shard_size: int | str | None = None,
) -> None:
    """Write a converted model: its ``state_dict`` and, as plain data, how it was converted and how to make it again.

    What was decided on top, ``bnn.decisions``, and what was done with it, ``bnn.history``, are written too.

    The file is complete or not there: it is written beside ``path`` and renamed. It loads under ``weights_only=True``,
    and its ``"state_dict"`` has the original keys plus ``*_rho``, ``*_prior_mean``, ``*_prior_std`` and
    ``*_initial_std``. A path that ends in ``.safetensors`` gets a file of that format, in which a tied parameter
    stands once.

    A model that is sharded (FSDP2, tensor parallelism) has to be saved by all ranks together. The first one gathers it
    in the memory of its CPU, one tensor after another, and writes one whole file; the others wait for it.

    Args:
        bnn: The model.
        path: The file.
        dtype: ``"int8"`` writes Bayesian weights of two dimensions or more in two bytes, one for μ and one for log σ,
            with scales for each row, and a third one only where the mean of the prior is not μ. :func:`load` makes of
            that an ordinary model of the original dtype; the error is written down, and ``bnnify-cli inspect`` shows
            it. Zeros and pruned weights, what has one dimension, such as a bias, and what is not Bayesian stay exact.
            The names in the file then end in ``.int8``, ``.scale`` and ``.range``. Default: ``None``, all as it is.
        max_shard_size: Make of ``path`` a new folder with safetensors files of at most this size and their index, as
            Hugging Face does for large models: bytes, or a text such as ``"5GB"``. What belongs to one parameter stands
            in one file; one that is larger has a file of its own. Default: ``None``, one file.

    Raises:
        ArgumentError: The ``dtype`` is another one, or ``max_shard_size`` is no size.
        ArgumentTypeError: ``bnn`` is not a converted model.
        CheckpointError: A prior, a rule for σ or a decision is not one of bnnify's own, so that no file could restore
            it; a weight is quantized by torchao or bitsandbytes; the model holds something that :func:`load` would not
            read; the ending of the path is that of another format, such as ``.onnx``; or the file cannot be written.
    """
    check_path("save(path)", path)
    if not isinstance(bnn, BayesianModel):
        raise ArgumentTypeError(
            f"save takes a converted model, not {describe(bnn)}. Convert it first with bnnify.convert; torch.save "
            "writes plain models."
        )
    if dtype is not None and dtype not in DTYPES:
        raise ArgumentError(f"save takes dtype='int8' or None, the dtype of the model, not {describe(dtype)}.")
    shard_size = None if max_shard_size is None else as_bytes(max_shard_size)
    check_ending(path)
    parameters = list(bayesian_parameters(bnn.module))
    for parameter in parameters:
        for what in (parameter.prior, parameter.settings.posterior_std, parameter.posterior):
            if not can_be_saved(what):
                raise CheckpointError(
                    f"Cannot save `{parameter.name}`: {what!r} is not one of bnnify's own; a file could not restore "
                    "it. Save bnn.module.state_dict() and convert with the same settings before loading it."
                )
    _refuse_quantized(bnn.module)
    settings = {parameter.name: parameter.settings for parameter in parameters}
    state_dict = bnn.module.state_dict()
    for name in _left_behind(bnn.module):
        del state_dict[name]
    origin = bnn.origin or Origin()
    notes: dict[str, Any] = {"history": bnn.history, "decisions": bnn.decisions, "max_shard_size": shard_size}
    if not any(map(is_distributed, state_dict.values())):
        write_posterior(path, state_dict, settings, origin, dtype, **notes)
        return
    whole = gathered(state_dict)
    written_by_one(path, lambda: write_posterior(path, whole or {}, settings, origin, dtype, **notes))


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> BayesianModel:
    """Read a file that :func:`save` or ``bnnify-cli convert`` wrote, and make the converted model of it.

    Nothing in the file can run code: it is read under ``weights_only=True``, and of the models that it may name only
    those of torchvision, timm and transformers, with adapters of peft, are made, by these libraries.

    Args:
        path: The file, or the folder or index of one in shards.
        model: A model of the original architecture, with any weights; it is copied. Default: ``None``, the model that
            the file names.

    Raises:
        CheckpointError: The file cannot be read, is not bnnify's, is of a newer format, does not say how to make its
            model, or does not fit the model.
    """
    check_path("load(path)", path)
    if model is not None:
        check_module("load(model)", model)
    file = open_posterior(path)
    try:
        model = _make_model(file) if model is None else collapse(model)
        bnn = convert_with(model, file.settings, inplace=True)
    except ConversionError as error:
        raise CheckpointError(f"`{path}` does not fit the model ({type(model).__name__}): {error}") from error
    load_weights(bnn, file.state_dict)
    bnn.origin, bnn.history, bnn.decisions = file.origin, file.history, file.decisions
    return bnn


def _make_model(file: PosteriorFile) -> nn.Module:
    config, adapter = file.origin.config, file.origin.adapter
    if config is not None and adapter is not None:
        base, _ = load_by_config(config, base_weights(config, adapter, file.plain_state_dict))
        return without_values(with_adapter(base, adapter))
    if config is not None:
        return without_values(load_by_config(config, file.plain_state_dict)[0])
    recipe = file.origin.recipe
    if recipe is None:
        raise CheckpointError(
            f"`{file.path}` does not say how to make its model. Pass one of the same architecture: load(path, model)."
        )
    recipe.check(file.plain_state_dict)  # takes no memory; what a damaged file asks for might not fit into any
    return build_without_values(recipe.build)


def build_without_values(make_model: Callable[[], nn.Module]) -> nn.Module:
    """Make a model on the meta device where that is enough, since its weights are to come from a file.

    It is not where a model has values that no state_dict holds, or looks at its values while it is made.
    """
    try:
        with torch.device("meta"):
            model = make_model()
    except Exception:
        return make_model()
    return make_model() if not isinstance(model, nn.Module) or valueless_buffers(model) else model


def without_values(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` with its parameters on the meta device, tied as they were."""
    memo = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, dict[int, Any](memo))


def _refuse_quantized(root: nn.Module) -> None:
    """Raise where a quantized weight is of a library's own kind, which no file of bnnify's could make again."""
    found = {
        name: type(parameter).__name__
        for name, parameter in root.named_parameters()
        if is_quantized(parameter) and type(parameter) is not nn.Parameter
    }
    if found:
        raise CheckpointError(
            f"Cannot save the whole model: {abridged(map(printable, found))} are quantized "
            f"({', '.join(sorted(set(found.values())))}), and a file could not restore them. With torch.save, save "
            "what is Bayesian out of bnn.module.state_dict(); convert the quantized model again and read it with "
            "bnn.module.load_state_dict(..., strict=False)."
        )


def _left_behind(root: nn.Module) -> Iterator[str]:
    """Name what belongs to a parameter that is no longer there, such as a bias that was set to None."""
    for prefix, module in root.named_modules(remove_duplicate=False):
        for attribute, slot in slots_of(module).items():
            endings = (*slot.settings.posterior.companions, *OF_PRIOR)
            for ending in endings if module._parameters.get(attribute) is None else ():
                if module._parameters.get(attribute + ending) is not None:
                    yield f"{prefix}.{attribute}{ending}".removeprefix(".")
