"""Convert the model in a checkpoint of any kind."""

__all__ = ["convert_checkpoint"]

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..convert import convert
from ..errors import ArgumentError, ArgumentTypeError, CheckpointError, check_module, check_path, describe
from ..model import BayesianModel
from .architectures.recipe import Recipe
from .architectures.recognition import recognise
from .architectures.shapes import abridged, printable
from .architectures.transformers_model import load_by_config
from .convert_adapter import convert_adapter, refuse_not_finite
from .foreign.read_write import Checkpoint, read
from .load_weights import load_weights
from .own_format import own_record
from .posterior_file import Origin
from .save_load import build_without_values, without_values


def convert_checkpoint(
    path: str | os.PathLike[str],
    make_model: Callable[[], nn.Module] | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    key: str | None = None,
    trust: bool = False,
    **options: Any,
) -> BayesianModel:
    """Convert the model whose weights are in a file, whoever wrote it.

    Args:
        path: A state_dict or a training checkpoint of torch's, a safetensors file, the index of a sharded one, a
            Hugging Face model directory, that of a LoRA adapter (``adapter_config.json`` and its tensors), a pickled
            module of torch.nn's and torchvision's classes, or an exported program.
        make_model: Makes the model that the weights belong to. Default: ``None``; the architecture is recognised by
            the names and shapes in the file.
        base: The Hugging Face directory of the model that an adapter was trained on. The base stays frozen, and the
            adapter's matrices become Bayesian unless ``select`` says otherwise. Default: ``None``.
        key: Where in the file the state_dict stands, such as ``"ema.state_dict"``, if it holds several.
        trust: Let a pickled module run the code that it names. Default: ``False``; nothing in a file runs.
        options: Those of :func:`bnnify.convert`, which is given the model with its weights.

    Returns:
        The converted model. Its ``origin`` says where the weights came from, and :func:`bnnify.save` writes that down.

    Raises:
        ArgumentTypeError: ``make_model`` is no function that returns a model.
        CheckpointError: The file cannot be read, its model is not recognised or does not fit, a weight is not finite,
            or an adapter comes without its base.
        ConversionError: The model cannot be converted; see :func:`bnnify.convert`.
    """
    check_path("convert_checkpoint(path)", path)
    if make_model is not None and base is not None:
        raise ArgumentError("Pass base (--base) for an adapter, or make_model (--model) for a whole model, not both.")
    model = None if make_model is None else _made(make_model)
    checkpoint = read(path, key=key, names=None if model is None else model.state_dict().keys(), trust=trust)
    if checkpoint.is_adapter or base is not None:
        return convert_adapter(path, checkpoint, base, trust=trust, **options)
    if own_record(checkpoint) is not None:
        raise CheckpointError(
            f"`{path}` was written by bnnify, and its model is Bayesian already. bnnify.load makes that model, "
            "`bnnify-cli inspect` describes it, and `bnnify-cli collapse` writes the plain weights."
        )
    refuse_not_finite(path, checkpoint)
    recipe: Recipe | None = None
    notes = [f"left out, as it is no plain data: {abridged(checkpoint.left_out)}"] if checkpoint.left_out else []
    if model is None and checkpoint.config is not None:
        model, checkpoint, unused = _by_config(checkpoint, checkpoint.config)
        notes += [f"left out, as the model has no place for it: {abridged(map(printable, unused))}"] if unused else []
    elif model is None and checkpoint.module is None:
        found = recognise(checkpoint.state_dict)
        model, recipe = build_without_values(found.recipe.build), found.recipe
        if found.prefix:
            checkpoint = read(path, key=key, names=model.state_dict().keys(), trust=trust)
        notes += [f"{', '.join(found.same)} would have the same tensors"] if found.same else []
        notes += found.notes
    if beside := checkpoint.beside:
        notes.append(f"beside the model, and not converted: {abridged(map(printable, beside))}")
    if model is not None:
        load_weights(model, checkpoint.state_dict)
    plain: Any = checkpoint.module if model is None else model  # a file without a module has had its model made
    bnn = convert(plain, inplace=True, **options)
    bnn.origin = Origin(recipe, checkpoint.config, checkpoint.layout, checkpoint.rest, tuple(notes))
    return bnn


def _made(make_model: Callable[[], nn.Module]) -> nn.Module:
    if isinstance(make_model, nn.Module) or not callable(make_model):
        raise ArgumentTypeError(
            f"make_model must be a function that returns the model, not {describe(make_model)}. Pass lambda: model."
        )
    model = build_without_values(make_model)
    check_module("What make_model returns", model)
    return model


def _by_config(checkpoint: Checkpoint, config: Mapping[str, Any]) -> tuple[nn.Module, Checkpoint, list[str]]:
    """Make the model of transformers that ``config`` describes; list the names left over."""
    loaded, unused = load_by_config(config, checkpoint.state_dict)
    state_dict = loaded.state_dict()
    layout = replace(checkpoint.layout, names=tuple(name for name in checkpoint.layout.names if name in state_dict))
    return without_values(loaded), replace(checkpoint, state_dict=state_dict, layout=layout), unused
