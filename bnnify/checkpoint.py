"""A converted model into a file of bnnify's and out of it."""

__all__ = ["build_without_values", "load", "make_from_config", "save"]

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .convert import collapse, convert_with
from .errors import CheckpointError, ConversionError
from .files.folder import model_from_config
from .model import BayesianModel
from .parameters import BayesianParameter, bayesian_parameters
from .posterior_file import Origin, PosteriorFile, open_posterior, write_posterior
from .settings_data import can_be_saved
from .weights import load_weights


def save(bnn: BayesianModel, path: str | os.PathLike[str]) -> None:
    """Write a converted model: its ``state_dict`` and, as plain data, how it was converted and how to make it again.

    The file is complete or not there: it is written beside ``path`` and renamed. It loads under ``weights_only=True``,
    and its ``"state_dict"`` has the original keys plus ``*_rho``, ``*_prior_mean`` and ``*_initial_std``. A path that
    ends in ``.safetensors`` gets a file of that format, in which a tied parameter stands once.

    Raises:
        CheckpointError: A prior or a rule for σ is not one of bnnify's own, so that no file could restore it; or the
            file cannot be written.
    """
    parameters = list(bayesian_parameters(bnn.module))
    for parameter in parameters:
        _check_savable(parameter)
    settings = {parameter.name: parameter.settings for parameter in parameters}
    write_posterior(path, bnn.module.state_dict(), settings, bnn.origin or Origin())


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> BayesianModel:
    """Read a file that :func:`save` or ``bnnify-cli convert`` wrote, and make the converted model of it.

    Nothing in the file can run code: it is read under ``weights_only=True``, and of the models that it may name only
    those of torchvision, timm and transformers are made, by these libraries.

    Args:
        path: The file.
        model: A model of the original architecture, with any weights; it is copied. Default: ``None``, the model that
            the file names.

    Raises:
        CheckpointError: The file cannot be read, is not bnnify's, is of a newer format, does not say how to make its
            model, or does not fit the model.
    """
    file = open_posterior(path)
    try:
        model = _make_model(file) if model is None else collapse(model)
        bnn = convert_with(model, file.settings, inplace=True)
    except ConversionError as error:
        raise CheckpointError(f"`{path}` does not fit the model ({type(model).__name__}): {error}") from error
    load_weights(bnn, file.state_dict)
    bnn.origin = file.origin
    return bnn


def _make_model(file: PosteriorFile) -> nn.Module:
    if file.origin.config is not None:
        return make_from_config(file.origin.config, file.plain_state_dict)
    recipe = file.origin.recipe
    if recipe is None:
        raise CheckpointError(
            f"`{file.path}` does not say how to make its model. Pass one of the same architecture: load(path, model)."
        )
    recipe.check(file.plain_state_dict)  # takes no memory; what a damaged file asks for might not fit into any
    return build_without_values(recipe.build)


def build_without_values(make_model: Callable[[], nn.Module]) -> nn.Module:
    """The model on the meta device where that is enough, since its weights are to come from a file.

    It is not where a model has values that no state_dict holds, or looks at its values while it is made.
    """
    try:
        with torch.device("meta"):
            model = make_model()
    except Exception:
        return make_model()
    return make_model() if _lacks_values(model) else model


def make_from_config(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> nn.Module:
    """The model of transformers that ``config`` describes, on the meta device where that is enough.

    Raises:
        CheckpointError: transformers cannot make it, or it is larger than what ``state_dict`` fills.
    """
    model = model_from_config(config)
    wanted, given = (sum(t.numel() for t in tensors) for tensors in (model.parameters(), state_dict.values()))
    if wanted > given:
        raise CheckpointError(f"The config is for a model of {wanted:,} weights, but the file has {given:,}.")
    return model_from_config(config, "cpu") if _lacks_values(model) else model


def _lacks_values(model: nn.Module) -> bool:
    """Whether a buffer on the meta device is one that no state_dict holds."""
    return any(
        buffer is not None and buffer.is_meta and name in module._non_persistent_buffers_set
        for module in model.modules()
        for name, buffer in module._buffers.items()
    )


def _check_savable(parameter: BayesianParameter) -> None:
    for what in (parameter.settings.prior, parameter.settings.posterior_std):
        if not can_be_saved(what):
            raise CheckpointError(
                f"Cannot save `{parameter.name}`: {what!r} is not one of bnnify's own; a file could not restore it. "
                "Save bnn.module.state_dict() and convert with the same settings before loading it."
            )
