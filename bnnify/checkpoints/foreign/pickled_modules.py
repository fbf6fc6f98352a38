"""A whole pickled module, rebuilt from its record without calling what the file names.

No constructor runs. Each module is made empty and given its ``__dict__``, once it is known that the dict holds the
registries that it should, no hooks, nothing in place of a method, and only data, tensors, modules and activation
functions.
"""

__all__ = ["build_module"]

import functools
import importlib
import sys
import types
from collections import OrderedDict
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...torch_internals import ACTIVATIONS, activation
from .archive import Refusal
from .records import MAX_NAMES, Instance, Name

_PARALLEL = "torch.nn.parallel.data_parallel.DataParallel"
_ACTIVATIONS = ("elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "relu6", "silu", "softplus")
_REGISTRIES: dict[str, tuple[type, ...]] = {
    "_parameters": (nn.Parameter,),
    "_buffers": (Tensor,),
    "_modules": (nn.Module,),
}
# What a call of a module calls, where it is there.
_CALLED = ("_compiled_call_impl", "_slow_forward")
_TRUST = (
    "Say what makes the model (--model, make_model=), save model.state_dict() instead, or pass --trust (trust=True), "
    "which runs the file's code."
)


def build_module(instance: Instance) -> nn.Module:
    """Build the module that ``instance`` is the record of, out of its DataParallel wrapper.

    Raises:
        Refusal: It holds something else than a trained module of torch or torchvision does.
    """
    if instance.name == _PARALLEL:
        instance = instance.state["_modules"]["module"]
    module = _Builder().build(instance)
    if not isinstance(module, nn.Module):
        raise Refusal(f"it holds a {type(module).__name__}. Save model.state_dict().")
    module.state_dict()  # as a check that it can be walked
    return module


class _Builder:
    def __init__(self) -> None:
        self.built: dict[int, Any] = {}
        self.names: dict[int, int] = {}
        self.values: dict[int, Any] = {}

    def build(self, instance: Instance) -> Any:
        if id(instance) in self.built:
            module = self.built[id(instance)]
            if module is None:
                raise Refusal("a module in it contains itself. Save model.state_dict() instead.")
            return module
        self.built[id(instance)] = None
        result = self._partial(instance) if instance.name == "functools.partial" else self._module(instance)
        self.built[id(instance)] = result
        return result

    def _module(self, instance: Instance) -> nn.Module:
        cls = _resolve(instance.name)
        state = instance.state
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)) or instance.arguments or type(state) is not dict:
            raise Refusal(f"it makes a `{instance.name}`, which is no trained module. {_TRUST}")
        state = {name: self._value(value) for name, value in state.items()}
        for name, value in state.items():
            self._check(cls, name, value)
        module = cls.__new__(cls)
        module.__setstate__(state)
        children = [child for child in module._modules.values() if child is not None]
        self.names[id(module)] = 1 + sum(self.names[id(child)] for child in children)
        if self.names[id(module)] > MAX_NAMES:
            raise Refusal("its modules are registered in each other too often. Save model.state_dict() instead.")
        return module

    def _check(self, cls: type[nn.Module], name: Any, value: Any) -> None:
        where = f"the state of a {cls.__name__} in it"
        if not isinstance(name, str):
            raise Refusal(f"{where} has the name {name!r}. {_TRUST}")
        if name in _REGISTRIES:
            fine = isinstance(value, dict) and all(
                isinstance(key, str) and key and "." not in key and isinstance(item, (*_REGISTRIES[name], type(None)))
                for key, item in value.items()
            )
        elif name.endswith("_hooks"):
            fine = isinstance(value, dict) and not value  # hooks are code
        elif name == "_non_persistent_buffers_set":
            fine = isinstance(value, set)
        elif name == "_all_weights":  # otherwise a recurrent layer makes its names anew, and from numbers in the file
            fine = bool(value and value[0]) and all(isinstance(weight, str) for weights in value for weight in weights)
        else:
            shadowed = getattr(cls, name, None)
            fine = not (callable(shadowed) or isinstance(shadowed, property) or name in _CALLED or name[:2] == "__")
        if not fine:
            raise Refusal(f"{where} has in `{name}` what a trained module does not have there. {_TRUST}")

    def _value(self, value: Any) -> Any:
        if isinstance(value, Instance):
            return self.build(value)
        if isinstance(value, Name):
            return _resolve(value.name)
        if type(value) not in (dict, OrderedDict, list, tuple):
            return value
        if id(value) not in self.values:
            if isinstance(value, dict):
                copied: Any = type(value)((key, self._value(item)) for key, item in value.items())
            else:
                copied = type(value)(map(self._value, value))
            self.values[id(value)] = copied
        return self.values[id(value)]

    def _partial(self, instance: Instance) -> Any:
        """As in torchvision's transformers: ``partial(nn.LayerNorm, eps=1e-6)``, kept by the module as an attribute."""
        function, arguments, keywords, namespace = instance.state
        if namespace or type(keywords) is not dict:
            raise Refusal(f"it has a function with attributes. {_TRUST}")
        return functools.partial(self._value(function), *map(self._value, arguments), **self._value(keywords))


def _resolve(dotted: str) -> Any:
    """Find the class or activation function of torch or torchvision that has the name."""
    module_name, _, attribute = dotted.rpartition(".")
    if module_name == ACTIVATIONS and attribute in _ACTIVATIONS:
        return activation(attribute)
    if module_name == "torch.nn.functional":
        function = vars(F).get(attribute)
        if isinstance(function, types.FunctionType) and function.__module__ == module_name:
            return function
    elif dotted.startswith(("torch.nn.modules.", "torchvision.models.", "torchvision.ops.")):
        if dotted.startswith("torchvision."):
            importlib.import_module("torchvision.models")
        # Only among what those libraries import themselves: a name in a file imports nothing.
        cls = vars(sys.modules.get(module_name, types.ModuleType(""))).get(attribute)
        home = getattr(cls, "__module__", "")
        if isinstance(cls, type) and home.startswith(("torch.nn.modules.", "torchvision.models.", "torchvision.ops.")):
            return cls
    raise Refusal(f"it names `{dotted}`, which the installed torch and torchvision do not have as a class. {_TRUST}")
