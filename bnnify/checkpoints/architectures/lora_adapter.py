"""LoRA adapters of the library peft: the model that an ``adapter_config.json`` and its base make together."""

__all__ = ["PREFIX", "base_weights", "config_for_task", "describe_adapter", "names_in_model", "with_adapter"]

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...errors import CheckpointError, MissingLibraryError
from .shapes import Difference, abridged, printable, shapes_of
from .transformers_model import model_from_config

# What makes the model. Everything else in the file is left out, and refused where it would change what is computed.
_USED = (
    "alpha_pattern",
    "base_model_name_or_path",
    "bias",
    "exclude_modules",
    "fan_in_fan_out",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "modules_to_save",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
)
_WITHOUT_EFFECT = (  # on a trained adapter, or without another key that is refused
    "auto_mapping",
    "corda_config",
    "eva_config",
    "inference_mode",
    "init_lora_weights",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "runtime_config",
)
_STARTS_THAT_LEAVE_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
_OF_TASK = {
    "CAUSAL_LM": "CAUSAL_LM",
    "SEQ_2_SEQ_LM": "SEQ_TO_SEQ_CAUSAL_LM",
    "SEQ_CLS": "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLS": "TOKEN_CLASSIFICATION",
    "QUESTION_ANS": "QUESTION_ANSWERING",
}
PREFIX = "base_model.model."
"""What peft puts before the names of the base."""


def describe_adapter(adapter: Mapping[str, Any]) -> str:
    """Say in a clause which model an adapter was trained on, as far as its config says."""
    name, revision, task = (adapter.get(key) for key in ("base_model_name_or_path", "revision", "task_type"))
    described = printable(str(name)) if name else "a model that adapter_config.json does not name"
    described += f", revision {printable(str(revision))}" if revision else ""
    return described + (f", for the task {printable(str(task))}" if task else "")


def config_for_task(config: Mapping[str, Any], adapter: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Any:
    """Return the base's ``config.json`` for the class that the adapter's task needs, with as many labels as it has.

    An adapter for classification has a head of its own, on a base that was published with another one.
    """
    import transformers

    task, by_class = str(adapter.get("task_type")), adapter.get("auto_mapping")
    kinds, model_type = transformers.CONFIG_MAPPING, str(config.get("model_type"))
    kind = kinds[model_type] if model_type in kinds else None
    classes = getattr(transformers, f"MODEL_FOR_{_OF_TASK.get(task)}_MAPPING", {})
    cls, changed = classes.get(kind, None), dict(config)
    if isinstance(cls, type):
        changed["architectures"] = [cls.__name__]
    elif isinstance(by_class, Mapping) and "base_model_class" in by_class:
        changed["architectures"] = [by_class["base_model_class"]]
    heads = [
        value.shape[0]
        for name, value in weights.items()
        if value.ndim == 2 and {"classifier", "score"} & set(name.split(".")) and "lora_" not in name
    ]
    if task in ("SEQ_CLS", "TOKEN_CLS") and heads:
        if len(config.get("id2label") or "ab") != heads[-1]:
            changed.update(id2label=None, label2id=None)
        changed["num_labels"] = heads[-1]
    return changed


def with_adapter(base: Any, adapter: Mapping[str, Any]) -> Any:
    """Put a LoRA adapter on ``base``, in place, as ``PeftModel.from_pretrained`` does, but without its weights.

    Half-precision adapters become float32, as peft's do. Nothing is looked up on a hub and no code of the adapter runs.

    Args:
        base: The model that it was trained on; on the meta device it takes no memory.
        adapter: The content of ``adapter_config.json``.

    Returns:
        The ``PeftModel`` in eval mode; its adapter can be trained, and its base is frozen.

    Raises:
        CheckpointError: The config is of another kind of adapter or asks for what is not supported, or for what the
            base does not have. ``base`` may have been changed.
    """
    peft = _import_peft()
    known = _checked(adapter)
    base.name_or_path = known.get("base_model_name_or_path") or ""  # where peft looks for the name that it saves
    device = next(base.parameters()).device  # peft would make them on the CPU before it moves them
    with warnings.catch_warnings(), device:
        warnings.simplefilter("ignore")
        try:
            return peft.get_peft_model(base, peft.LoraConfig(**known)).eval()
        except Exception as error:
            reason = " ".join(str(error).split())[:300].rstrip(".")
            raise CheckpointError(
                f"peft cannot put the adapter on the base, a {type(base).__name__}: {type(error).__name__}: "
                f"{printable(reason)}. It was trained on {describe_adapter(adapter)}: pass that model."
            ) from error


def names_in_model(
    config: Mapping[str, Any], adapter: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> dict[str, str]:
    """Map the names that the tensors of an adapter have in its file to those in the ``PeftModel``.

    Raises:
        CheckpointError: They are not those of this adapter on the base of this ``config.json``; as with_adapter.
    """
    model = with_adapter(model_from_config(config), adapter)
    state = model.state_dict()
    # It chooses and renames, and looks at no value.
    names = {name: name for name in state}
    own: dict[str, str] = _import_peft().get_peft_model_state_dict(model, names, save_embedding_layers=False)
    own |= {name: name for name in weights if name in state}  # as an embedding, which may be saved with an adapter
    for name, value in weights.items():
        if name in own and state[own[name]].shape != value.shape:
            raise CheckpointError(
                f"The adapter does not fit the base, a {type(model.get_base_model()).__name__}: {printable(name)} is "
                f"{tuple(value.shape)} in the file and {tuple(state[own[name]].shape)} on this base. It was trained on "
                f"{describe_adapter(adapter)}: pass that model."
            )
    wrong = {
        "missing": [printable(name) for name in own if name not in weights],
        "without a place": [printable(name) for name in weights if name not in own],
    }
    if listing := "; ".join(f"{what}: {abridged(names)}" for what, names in wrong.items() if names):
        raise CheckpointError(
            f"The adapter's tensors are not those that adapter_config.json asks for on this base. {listing}. It was "
            f"trained on {describe_adapter(adapter)}: pass that model, or get the adapter's files again."
        )
    return own


def base_weights(
    config: Mapping[str, Any], adapter: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return what a ``PeftModel``'s ``state_dict`` has of its base, under the names that the base has by itself.

    Raises:
        CheckpointError: The two configs make another model than that of ``state_dict``.
    """
    base = model_from_config(config)
    own = base.state_dict(keep_vars=True)
    whole = with_adapter(base, adapter).state_dict(keep_vars=True)
    if difference := Difference.between(shapes_of(whole), shapes_of(state_dict)):
        raise CheckpointError(f"The weights are not those of the adapter on its base: {difference}.")
    names = {tensor: name for name, tensor in whole.items()}
    return {name: state_dict[names[tensor]] for name, tensor in own.items()}


def _checked(adapter: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of the config makes the model."""
    if adapter.get("peft_type") != "LORA":
        raise CheckpointError(
            f"adapter_config.json is for an adapter of the kind {printable(str(adapter.get('peft_type')))}; only LORA "
            "is read. Load it with PeftModel.from_pretrained, and convert the model with bnnify.convert(select=…)."
        )
    start = adapter.get("init_lora_weights")
    unknown = [key for key, value in adapter.items() if value and key not in (*_USED, *_WITHOUT_EFFECT)]
    if start not in _STARTS_THAT_LEAVE_THE_BASE:  # other weights than those of the base stand below such an adapter
        unknown.append(f"init_lora_weights={start}")
    if unknown:
        raise CheckpointError(
            f"adapter_config.json asks for what is not supported: {abridged(map(printable, unknown))}. Load it with "
            "PeftModel.from_pretrained, and convert the model with bnnify.convert(select=…)."
        )
    return {key: adapter[key] for key in _USED if adapter.get(key) is not None}


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingLibraryError("A LoRA adapter needs peft: pip install peft.") from error
    return peft
