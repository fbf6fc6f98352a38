"""Recognise models of published code alone, whose output depends on nothing but what they are called with."""

__all__ = ["State", "is_known", "is_plain", "is_plain_tensor"]

import inspect
import sys
from collections.abc import Iterator, Mapping
from functools import partial, partialmethod
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..draws.companions import PriorMean
from ..modules.settings import plain_class
from ..torch_internals import MODULE_STATE, has_global_hooks, has_own_hooks, is_compiled

_LAYERS = ("timm.", "torch.nn.", "torchvision.", "transformers.")
"""In eval mode the layers of these libraries depend on inputs, tensors, their attributes and random numbers only."""

_LIBRARIES = {"bnnify", "timm", "torch", "torchvision", "transformers"}
_LIBRARIES |= {"huggingface_hub", "packaging", "safetensors", "typing_extensions"}
"""The libraries whose functions such layers call or import."""

_LIBRARIES_AND_PYTHON = _LIBRARIES | sys.stdlib_module_names

_OTHER_SOURCES = {"numpy", "random", "secrets", "time"}
"""Sources of numbers outside of torch: a layer in a file that imports one of these is not known."""

_READS_UNSEEN = {"numpy", "tolist"}
"""Methods that read a tensor without an operation of torch."""

_IMMUTABLE = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.memory_format)


class State:
    """A snapshot of what the modules of a model hold: tensors, attributes, and the contents of containers."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._values = list(_held(root))

    def is_unchanged(self) -> bool:
        """Tell whether they hold the same objects now."""
        now = list(_held(self._root))
        return len(now) == len(self._values) and all(a is b for a, b in zip(now, self._values, strict=True))


def is_known(root: nn.Module) -> bool:
    """Tell whether each module is of a class of these libraries, as published, in eval mode and without hooks."""
    parts = list(root.modules())
    classes = set(map(plain_class, parts))
    ids = set(map(id, parts))
    if has_global_hooks() or not all(map(_is_published, classes)) or not all(_is_ordinary(part, ids) for part in parts):
        return False
    files = {sys.modules.get(str(each.__module__)) for cls in classes for each in (cls, *_methods(cls))}
    # Functions that all layers call. Of torch, Lightning replaces one that no layer does.
    shared = (vars(torch).copy(), vars(torch.nn.functional))
    shared[0].pop("compile", None)
    return all(file is not None and _is_open(file) for file in files) and all(map(_is_original, shared))


def is_plain(value: Any) -> bool:
    """Tell whether ``value`` is a tensor, an immutable value, or a tuple of these."""
    if isinstance(value, tuple):
        return all(map(is_plain, value))
    return is_plain_tensor(value) or isinstance(value, _IMMUTABLE)


def is_plain_tensor(value: Any) -> bool:
    """Tell whether ``value`` is a dense tensor with memory of its own."""
    plain = type(value) in (Tensor, nn.Parameter, nn.Buffer, PriorMean) and value.layout is torch.strided
    return plain and not (value.is_nested or value.is_quantized or value.is_meta or value.is_inference())


def _is_published(cls: type) -> bool:
    bases = [base for base in cls.__mro__ if base is not object]
    if not cls.__module__.startswith(_LAYERS) or not all(_is_original(vars(base)) for base in bases):
        return False
    return not any(_READS_UNSEEN & _names(inspect.unwrap(each).__code__) for each in _methods(cls))


def _methods(cls: type) -> Iterator[FunctionType]:
    """The functions of a forward; bases without a forward help to make a layer, to load it or to generate with it."""
    for base in cls.__mro__:
        if "forward" in vars(base) and base is not nn.Module:
            for function in map(_function, vars(base).values()):
                if function is not None and function.__name__ != "__init__":
                    yield function


def _is_open(file: ModuleType) -> bool:
    """Tell whether a file imports no other source of numbers, and no function in it has been replaced."""
    values = vars(file).copy()  # to which another thread may add what it imports
    registries = (value for value in values.values() if isinstance(value, Mapping))
    return (
        not any(_library(value) in _OTHER_SOURCES for value in values.values())
        and _is_original(values)
        and all(map(_is_original, registries))  # such as that of attention functions
    )


def _is_original(values: Mapping[str, Any]) -> bool:
    """Tell whether the functions among ``values`` are those of the libraries, or of Python itself."""
    found = list(values.values())
    return all(f is None or _library(f) in _LIBRARIES_AND_PYTHON for f in map(_function, found)) and not any(
        isinstance(value, partialmethod) for value in found
    )


def _function(value: Any) -> Any:
    """The function in ``value``, an attribute of a class or module: itself, or in a property or method."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    elif isinstance(value, property):
        value = value.fget
    return value if isinstance(value, FunctionType) else None


def _is_ordinary(module: nn.Module, parts: set[int]) -> bool:
    own = {name: value for name, value in vars(module).copy().items() if name not in MODULE_STATE}
    tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    return (
        not (module.training or has_own_hooks(module) or is_compiled(module))
        and all(map(is_plain_tensor, tensors))
        and "forward" not in own
        and all(_is_known_value(value, parts) for value in own.values())
    )


def _is_known_value(value: Any, parts: set[int], depth: int = 0) -> bool:
    if isinstance(value, nn.Module):
        return id(value) in parts
    if is_plain(value):
        return True
    if isinstance(value, (FunctionType, BuiltinFunctionType, type)):
        return _library(value) in _LIBRARIES
    if isinstance(value, partial):
        inside = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, (list, tuple, set, frozenset)):
        inside = list(value)
    elif isinstance(value, Mapping):
        inside = list(value.values())
    elif _library(type(value)) in _LIBRARIES:
        inside = list(getattr(value, "__dict__", {}).values())
    else:
        return False
    return depth < 5 and all(_is_known_value(each, parts, depth + 1) for each in inside)


def _library(value: Any) -> str:
    """The library of a class, function or module; a built-in without one counts as torch's."""
    if isinstance(value, FunctionType):
        name = value.__globals__.get("__name__")  # unlike its __module__, functools.wraps does not change it
    else:
        name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    return name.partition(".")[0] if isinstance(name, str) else "torch"


def _names(code: CodeType) -> set[str]:
    """The names that a function and the functions inside of it use."""
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)


def _held(root: nn.Module) -> Iterator[Any]:
    for module in root.modules():
        for values in (module._parameters, module._buffers, vars(module)):
            for value in list(values.values()):  # another thread may be in a forward that adds to them
                yield value
                if isinstance(value, Mapping):
                    yield from list(value.values())
                elif isinstance(value, (list, tuple, set)):
                    yield from value
