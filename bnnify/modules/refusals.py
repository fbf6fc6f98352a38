"""Errors for what cannot be converted, which say what to do about it."""

__all__ = ["is_quantized", "refuse_model", "refuse_parameter", "refuse_sharded"]

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..draws.companions import INITIAL_STD, OF_PRIOR
from ..draws.sharding import is_distributed, is_sharding
from ..errors import ConversionError
from ..torch_internals import OPTIMIZED_MODULE, SCRIPT_MODULE, FakeTensor, fsdp_places
from .settings import is_bayesian, slots_of

# By qualified class name, so that looking for a class never imports the part of torch that defines it.
_REFUSED_CLASSES = {
    "torch.nn.parallel.data_parallel.DataParallel": "Convert its `.module`, and train with DistributedDataParallel: "
    "DataParallel copies modules in a way that cannot carry a draw.",
    "torch.nn.parallel.distributed.DistributedDataParallel": "Convert its `.module` first and wrap the result.",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": "That is FSDP1, whose flat "
    "parameters no draw can read: convert the model it was made from, and shard the result with FSDP2, fully_shard.",
    "torch.distributed.fsdp.FSDPModule": "Convert first, then shard it.",
    OPTIMIZED_MODULE: "Convert its `._orig_mod` first and compile the result.",
    SCRIPT_MODULE: "It has no Python class to extend: convert the model it was made from. "
    "Where that is lost, bring the program into the form of torch.export, and convert its `.module()`.",
}
# What quantization leaves in a float model that is only prepared for it, computes in floats.
_QUANTIZED = re.compile(r"torch\.ao\.nn\.(\w+\.)*quantized\.(?!reference\.)(?!.*FloatFunctional$)")
_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def refuse_model(model: object) -> None:
    """Refuse a model no part of which may be converted.

    Raises:
        ConversionError: It is not a module; a module in it is quantized, scripted, or wrapped for parallel, sharded or
            compiled execution; or conversion runs under ``inference_mode``.
    """
    if not isinstance(model, nn.Module):
        what = "its `.module()`" if type(model).__name__ == "ExportedProgram" else "the model itself"
        raise ConversionError(f"Cannot convert {type(model).__name__}: it is not a torch.nn.Module. Pass {what}.")
    if torch.is_inference_mode_enabled():
        raise ConversionError(
            f"Cannot convert {type(model).__name__} under torch.inference_mode(): the new parameters could not be "
            "trained. Convert outside of it."
        )
    for name, module in model.named_modules():
        for cls in type(module).__mro__:
            qualified = f"{cls.__module__}.{cls.__qualname__}"
            advice = _REFUSED_CLASSES.get(qualified)
            if advice is None and _QUANTIZED.match(qualified):
                advice = (
                    "It has no floating-point weights to learn: convert first, and quantize what collapse gives back."
                )
            if advice:
                raise ConversionError(f"Cannot convert {_where(name, module)}: it is a {cls.__name__}. {advice}")


def refuse_parameter(
    name: str, module: nn.Module, attribute: str, parameter: Tensor, companions: Sequence[str]
) -> None:
    """Refuse a selected parameter that cannot have a Gaussian posterior.

    Raises:
        ConversionError: It is quantized, lazy, not of a real floating-point type, or was made under ``inference_mode``;
            its layer rewrites it during forward; or the module has an attribute of a name that is needed.
    """
    where = _where(name, module)
    if _is_foreign(parameter):
        raise ConversionError(
            f"Cannot convert {where}: its `{attribute}` is a {type(parameter).__name__}, which keeps its numbers in a "
            "format of its own, as quantized weights do. It has no floating-point weights to learn: leave this layer "
            "alone with `exclude`, or convert before it is quantized, and quantize what collapse gives back."
        )
    if is_lazy(parameter):
        raise ConversionError(
            f"Cannot convert {where}: it is lazy and has no shape yet. Run one forward through the model first."
        )
    if parameter.dtype not in _FLOATING:
        raise ConversionError(
            f"Cannot convert {where}: its dtype is {parameter.dtype}, and the posterior is defined for "
            "float64, float32, bfloat16 and float16. Exclude it with `exclude`, or convert before you quantize."
        )
    if parameter.is_inference():
        raise ConversionError(
            f"Cannot convert {where}: it was created under torch.inference_mode() and cannot be trained. "
            "Build or load the model outside of it."
        )
    if getattr(module, "max_norm", None) is not None and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        raise ConversionError(
            f"Cannot convert {where}: max_norm={module.max_norm} rewrites the weight during forward. "
            "Set max_norm=None or exclude this layer."
        )
    for taken in (*(attribute + ending for ending in (*companions, *OF_PRIOR, INITIAL_STD)), "_bayesian"):
        if hasattr(module, taken) and not (taken == "_bayesian" and is_bayesian(module)):
            raise ConversionError(
                f"Cannot convert {where}: the module already has an attribute `{taken}`, which the conversion "
                "needs. Rename it."
            )


def refuse_sharded(root: nn.Module) -> None:
    """Refuse to make a plain model of one whose Bayesian parameters FSDP2 shards.

    Raises:
        ConversionError: Names the first of them.
    """
    sharded = {place for module in root.modules() if is_sharding(module) for place in fsdp_places(module)}
    for name, module in root.named_modules():
        for attribute in slots_of(module):
            if (module, attribute) in sharded:
                raise ConversionError(
                    f"Cannot make a plain model of `{name}` ({type(module).__name__}): FSDP2 shards its `{attribute}` "
                    "together with ρ, and would go on looking for that. Let all ranks call bnnify.save(bnn, path); in "
                    "one process bnnify.load(path, model) then gives a model that collapse and freeze can take. (The "
                    "shards of the means alone are in bnn.module.state_dict(), under the names of the original.)"
                )


def is_quantized(parameter: Tensor) -> bool:
    """Tell whether a layer makes floating-point numbers of its weight ``parameter`` only when it runs."""
    return _is_foreign(parameter) or not (parameter.dtype in _FLOATING or parameter.is_complex())


def _is_foreign(parameter: Tensor) -> bool:
    """Tell whether it is of a tensor subclass with a computation of its own, such as torchao's quantized ones."""
    known = is_distributed(parameter) or isinstance(parameter, FakeTensor)
    return not known and type(parameter).__torch_dispatch__ is not Tensor.__torch_dispatch__


def _where(name: str, module: nn.Module) -> str:
    return f"`{name}` ({type(module).__name__})" if name else f"the model ({type(module).__name__})"
