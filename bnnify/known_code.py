"""Which models run nothing but published code that gives the same output whenever it is called with the same values."""

__all__ = ["is_known", "is_plain", "is_plain_tensor"]

import inspect
import sys
from collections.abc import Mapping
from functools import partial
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from .companions import PriorMean

_LIBRARIES = {"bnnify", "timm", "torch", "torchvision", "transformers"}
"""In eval mode their layers depend on nothing but inputs, tensors and random numbers, and keep nothing that matters."""

_OTHER_SOURCES = {"numpy", "random", "time"}
"""Where numbers may come from that torch knows nothing of: a layer in a file that imports one of these is not known."""

_READS_UNSEEN = {"numpy", "tolist"}
"""Methods that read a tensor without an operation of torch."""

_OF_EVERY_MODULE = vars(nn.Module()).keys()
_IMMUTABLE = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.memory_format)


def is_known(root: nn.Module) -> bool:
    """Whether each part of ``root`` is of a class of these libraries, as published, in eval mode and without hooks."""
    hooks = global_hooks._global_forward_hooks, global_hooks._global_forward_pre_hooks
    modules, classes = list(root.modules()), {getattr(type(m), "_plain_class", type(m)) for m in root.modules()}
    return not any(hooks) and all(map(_is_published, classes)) and all(map(_is_ordinary, modules))


def is_plain(value: Any) -> bool:
    """Whether ``value`` is a tensor, or something that nobody can change, or a tuple of such."""
    if isinstance(value, tuple):
        return all(map(is_plain, value))
    return is_plain_tensor(value) or isinstance(value, _IMMUTABLE)


def is_plain_tensor(value: Any) -> bool:
    """Whether ``value`` is a tensor with memory of its own, and not one of another kind."""
    plain = type(value) in (Tensor, nn.Parameter, nn.Buffer, PriorMean) and value.layout is torch.strided
    return plain and not (value.is_nested or value.is_quantized or value.is_meta or value.is_inference())


def _is_published(cls: type) -> bool:
    bases = [base for base in cls.__mro__ if base not in (nn.Module, object)]
    if not all(_library(each) in _LIBRARIES for each in (cls, *(f for base in bases for f in _functions(base)))):
        return False
    layers = [base for base in bases if "forward" in vars(base)]  # others help to make, to load or to generate
    functions = [f for base in layers for f in _functions(base) if f.__name__ != "__init__"]
    modules = [sys.modules.get(each.__module__) for each in (*layers, *functions)]
    imported = [value for module in modules for value in vars(module).values()]
    looks = [_READS_UNSEEN & set(inspect.unwrap(function).__code__.co_names) for function in functions]
    return not any(looks) and not any(_library(value) in _OTHER_SOURCES for value in imported)


def _functions(cls: type) -> list[FunctionType]:
    return [value for value in vars(cls).values() if isinstance(value, FunctionType)]


def _is_ordinary(module: nn.Module) -> bool:
    own = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
    tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    return (
        not (module.training or module._forward_hooks or module._forward_pre_hooks or module._compiled_call_impl)
        and all(map(is_plain_tensor, tensors))
        and "forward" not in own
        and all(map(_is_known_value, own.values()))
    )


def _is_known_value(value: Any) -> bool:
    if isinstance(value, (list, tuple, set, frozenset, Mapping)):
        return all(map(_is_known_value, value.values() if isinstance(value, Mapping) else value))
    if isinstance(value, partial):
        return all(map(_is_known_value, (value.func, *value.args, *value.keywords.values())))
    if isinstance(value, (FunctionType, BuiltinFunctionType, type)):
        return _library(value) in _LIBRARIES
    return is_plain(value) or _library(type(value)) in _LIBRARIES


def _library(value: Any) -> str:
    """The library of a class, function or module; of what does not say, as torch's own built-in functions, torch."""
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    return name.partition(".")[0] if isinstance(name, str) else "torch"
