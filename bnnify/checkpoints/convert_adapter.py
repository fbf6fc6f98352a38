"""Convert a LoRA adapter on its base model."""

__all__ = ["convert_adapter", "refuse_not_finite"]

import os
from dataclasses import replace
from typing import Any

from ..convert import convert
from ..errors import CheckpointError, check_path
from ..model import BayesianModel
from .architectures.lora_adapter import PREFIX, config_for_task, describe_adapter, names_in_model, with_adapter
from .architectures.shapes import abridged, printable
from .architectures.transformers_model import load_by_config
from .foreign.read_write import Checkpoint, not_finite, read
from .posterior_file import Origin


def convert_adapter(
    path: str | os.PathLike[str],
    checkpoint: Checkpoint,
    base: str | os.PathLike[str] | None,
    *,
    trust: bool = False,
    **options: Any,
) -> BayesianModel:
    """Put the adapter in ``checkpoint`` on the model in the directory ``base``, and make its matrices Bayesian.

    ``options`` are those of :func:`bnnify.convert`; a ``select`` among them chooses something else.

    Raises:
        CheckpointError: There is no adapter or no base, or the two do not fit.
    """
    adapter = checkpoint.config
    if adapter is None or not checkpoint.is_adapter:
        raise CheckpointError(
            f"`{path}` is no adapter: it is no directory with adapter_config.json and adapter_model.safetensors or "
            ".bin. Leave --base (base=) out to convert a whole model."
        )
    if base is None:
        raise CheckpointError(
            f"`{path}` is an adapter and no model: it was trained on {describe_adapter(adapter)}. Pass the directory "
            "with that model's config.json and weights as --base (base=)."
        )
    check_path("convert_checkpoint(base)", base)
    refuse_not_finite(path, checkpoint)
    found = read(base, trust=trust)
    if found.config is None or found.is_adapter:
        raise CheckpointError(
            f"`{base}` is not the directory of a model of transformers, with config.json and weights. The adapter was "
            f"trained on {describe_adapter(adapter)}."
        )
    refuse_not_finite(base, found)
    weights = checkpoint.state_dict
    config = config_for_task(found.config, adapter, weights)
    own = names_in_model(config, adapter, weights)
    heads = [name.removeprefix(PREFIX) for name in weights]  # what the adapter brings along need not be in the base
    model, unused = load_by_config(config, found.state_dict, heads)
    model = with_adapter(model, adapter)
    state = model.state_dict()
    for name, value in weights.items():
        state[own[name]].copy_(value)
    if options.get("select") is None:
        options["select"] = [own[name] for name, value in weights.items() if value.ndim > 1]
    bnn = convert(model, inplace=True, **options)
    layout = replace(checkpoint.layout, of_model=tuple(own[name] for name in checkpoint.layout.names))
    notes = [f"the adapter was trained on {describe_adapter(adapter)}; its base here is {printable(str(base))}"]
    notes += [f"left out, as the base has no place for it: {abridged(map(printable, unused))}"] if unused else []
    bnn.origin = Origin(None, config, layout, checkpoint.rest, tuple(notes), adapter)
    return bnn


def refuse_not_finite(path: str | os.PathLike[str], checkpoint: Checkpoint) -> None:
    """Raise where a weight in the checkpoint at ``path`` is NaN or infinite."""
    if names := not_finite(checkpoint.state_dict):
        raise CheckpointError(
            f"`{path}` has weights that are NaN or infinite: {abridged(names)}. It was saved after the "
            "training had diverged; use an earlier checkpoint."
        )
