"""Models of the library transformers, made from a ``config.json`` and filled by the library's own loading rules."""

__all__ = ["load_by_config", "model_from_config"]

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CheckpointError, MissingLibraryError
from .shapes import abridged, printable

# They change which code is run, or where it comes from, and nothing about the weights.
_NOT_OURS = (
    "_attn_implementation",
    "_attn_implementation_internal",
    "attn_implementation",
    "auto_map",
    "custom_pipelines",
    "distributed_config",
    "experts_implementation",
    "fusion_config",
    "kernel_config",
    "transformers_weights",
    "use_kernels",
)
_MAX_LAYERS = 1000
# What a model may have that no file holds, such as tables of positions, beyond a multiple of what the file holds.
_SPARE_ELEMENTS = 16 << 20


def model_from_config(config: Mapping[str, Any]) -> nn.Module:
    """Make the model that a ``config.json`` describes, on the meta device: its weights are in the file.

    Its class is looked up in the installed ``transformers``; code beside the weights or on a hub is not used.

    Raises:
        CheckpointError: transformers is missing or has no such class, or it cannot make a model from the config.
    """
    cls = _class_of(config)
    with _explained(cls), torch.device("meta"):
        return cls(_config_of(cls, config))


def load_by_config(
    config: Mapping[str, Any], state_dict: Mapping[str, Tensor], may_lack: Collection[str] = ()
) -> tuple[nn.Module, list[str]]:
    """Make the model that ``config`` describes and load ``state_dict`` into it as ``from_pretrained`` does.

    So names and tensors of older or other layouts are brought into those of the model, ties are made, and what the
    config says of the dtype holds.

    Args:
        config: The content of ``config.json``.
        state_dict: The tensors under the names that they have in the files.
        may_lack: Names of weights that may be missing, and start at random. Default: ``()``, none.

    Returns:
        The model, on the CPU, in eval mode, and the names for which it had no place.

    Raises:
        CheckpointError: transformers cannot make the model or load the weights, or weights are missing, which
            ``from_pretrained`` would start at random.
    """
    cls = _class_of(config)
    _refuse_larger(model_from_config(config), state_dict)
    with _explained(cls), _silent():
        model, found = cls.from_pretrained(
            None,
            config=_config_of(cls, config),
            state_dict=dict(state_dict),
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    wrong = {
        "missing": [printable(name) for name in sorted(set(found["missing_keys"]) - {*may_lack})],
        "of another shape": [
            f"{printable(name)} {tuple(file)} for {tuple(own)}" for name, file, own in sorted(found["mismatched_keys"])
        ],
    }
    if listing := "; ".join(f"{what}: {abridged(names)}" for what, names in wrong.items() if names):
        raise CheckpointError(
            f"config.json is for a {cls.__name__}, and the weights are not all there: {listing}. Make the model with "
            "from_pretrained, which starts them at random, train it, and convert it with bnnify.convert; or name the "
            "model that the file is of with --model (make_model=)."
        )
    return model, sorted(found["unexpected_keys"])


def _class_of(config: Mapping[str, Any]) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingLibraryError("The model needs transformers: pip install transformers.") from error
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise CheckpointError(
            "config.json does not name the model's class: it has no `architectures`. Write it there, as in "
            '"architectures": ["GPT2LMHeadModel"], or make the model yourself and pass --model.'
        )
    name = architectures[0]
    cls = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"config.json is for the class {name!r:.80}, which transformers {transformers.__version__} does not have. "
            "Upgrade it, or make the model yourself and pass --model."
        )
    if "quantization_config" in config:
        raise CheckpointError("config.json says that the model is quantized. Convert the model as it was before.")
    return cls


def _config_of(cls: Any, config: Mapping[str, Any]) -> Any:
    return cls.config_class.from_dict(_checked(config))


def _checked(value: Any) -> Any:
    """Leave out what names code, and refuse thousands of layers: on the meta device they take nothing but time."""
    if not isinstance(value, Mapping):
        return value
    for key, item in value.items():
        if isinstance(item, int) and item > _MAX_LAYERS and ("layer" in key or "expert" in key or "depth" in key):
            raise CheckpointError(f"config.json asks for a model with {key}={item}, which no checkpoint fills.")
    return {key: _checked(item) for key, item in value.items() if key not in _NOT_OURS}


def _refuse_larger(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Raise where the model takes far more memory than the file accounts for."""
    wanted = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    given = sum(tensor.numel() for tensor in state_dict.values())
    if wanted > 4 * given + _SPARE_ELEMENTS:
        raise CheckpointError(f"The config is for a model of {wanted:,} numbers, but the file has {given:,}.")


@contextmanager
def _explained(cls: Any) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise CheckpointError(
            f"transformers cannot make a {cls.__name__} from config.json: {type(error).__name__}: {reason}. Make the "
            "model yourself and pass --model."
        ) from error


@contextmanager
def _silent() -> Iterator[None]:
    """Suppress the library's progress bars and its report on what was loaded."""
    from transformers.utils import logging as its_logging

    verbosity, bars = its_logging.get_verbosity(), its_logging.is_progress_bar_enabled()
    its_logging.set_verbosity(logging.CRITICAL)
    its_logging.disable_progress_bar()
    try:
        yield
    finally:
        its_logging.set_verbosity(verbosity)
        if bars:
            its_logging.enable_progress_bar()
