"""Whether a second forward of a model could differ from the first: in its hooks, its attributes, its random numbers."""

__all__ = ["RandomStates", "Surroundings", "runs_unobserved"]

import operator
import random
import sys
from collections import deque
from collections.abc import Iterable
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from .draw import Active
from .sampler import generator_states, restore_generators
from .sharding import is_sharding


def runs_unobserved(module: nn.Module) -> bool:
    """Whether nobody waits for the calls of ``module`` and its parts, and Python and torch run them as they stand."""
    return (
        not torch.is_inference_mode_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())
        and not (global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks)
        and all(map(_is_ordinary, module.modules()))
    )


def _is_ordinary(module: nn.Module) -> bool:
    tensors = [*module._parameters.values(), *module._buffers.values()]
    return (
        not (module._forward_hooks or module._forward_pre_hooks)
        and getattr(module, "_compiled_call_impl", None) is None
        and not isinstance(module, (torch.jit.ScriptModule, nn.parallel.DistributedDataParallel))
        and "_orig_mod" not in module._modules  # torch.compile
        and not is_sharding(module)
        and all(t is None or (type(t) in (Tensor, nn.Parameter, nn.Buffer) and not t.is_meta) for t in tensors)
    )


class Surroundings:
    """What a forward could change: the attributes, containers and tensors of the model and of what it is given.

    Args:
        things: Where to look.
    """

    def __init__(self, *things: Any) -> None:
        self._contents: dict[int, tuple[Any, list[Any]]] = {}  # by identity, which each holder keeps for itself
        self._tensors: list[Tensor] = []
        self._look_into(list(things))
        self._versions = _versions(self._tensors)
        self._buffers = [buffer for thing in things if isinstance(thing, nn.Module) for buffer in thing.buffers()]
        self._values = _values(self._buffers)

    def _look_into(self, todo: list[Any]) -> None:
        """Note what is reached from there through containers, attributes and closures."""
        while todo and len(self._contents) <= _LIMIT:
            value = todo.pop()
            if isinstance(value, Tensor):
                self._tensors.append(value)
            elif id(value) not in self._contents and not isinstance(value, _SKIPPED):
                found = _contents(value)
                self._contents[id(value)] = value, found
                todo += [each for each in found if type(each) not in _HOLD_NOTHING]

    def are_unchanged(self) -> bool:
        """Whether they hold what they held, and none of the tensors was written to."""
        return (
            len(self._contents) <= _LIMIT
            and all(_are_the_same(_contents(value), found) for value, found in self._contents.values())
            and _versions(self._tensors) == self._versions
            and all(map(torch.equal, _values(self._buffers), self._values))
        )


class RandomStates:
    """The states of the random number generators that have no owner: of torch, of Python, of numpy.

    Args:
        devices: The devices whose generators count, besides the CPU.
    """

    def __init__(self, devices: list[torch.device]) -> None:
        self._devices = devices
        self._python, self._torch = random.getstate(), generator_states(devices)
        self._numpy = numpy.get_state() if (numpy := sys.modules.get("numpy.random")) else None

    def are_unchanged(self) -> bool:
        """Whether nothing has been drawn since."""
        now = RandomStates(self._devices)
        return (
            self._python == now._python
            and all(map(torch.equal, self._torch, now._torch))
            and str(self._numpy and self._numpy[2:]) == str(now._numpy and now._numpy[2:])
        )

    def restore(self) -> None:
        """Let what has been drawn since be drawn again."""
        random.setstate(self._python)
        restore_generators(self._torch, self._devices)
        if self._numpy:
            sys.modules["numpy.random"].set_state(self._numpy)


_LIMIT = 100_000
"""So many containers and objects are looked into; a model of more is taken to have changed."""

_HOLD_NOTHING = {type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size}
_SKIPPED = (type, ModuleType, Active)
_TORCHS_OWN = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_modules", "training"} | {"_flat_weight_refs"}
"""Tables of hooks, of which `runs_unobserved` has seen to what matters, and what recurrent layers saw last."""


def _contents(value: Any) -> list[Any]:
    """What ``value`` holds as a container, in its attributes and in its closure, in a fixed order.

    A random number generator holds something else each time, for one cannot see what it has given out.
    """
    found: list[Any] = []
    if isinstance(value, dict):
        found = [*value, *value.values()]
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        found = [*value]
    elif isinstance(value, FunctionType):
        found = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
    elif isinstance(value, (random.Random, torch.Generator)) or str(type(value).__module__).startswith("numpy.random"):
        found = [object()]
    if type(attributes := getattr(value, "__dict__", None)) is dict:
        names = [name for name in attributes if name not in _TORCHS_OWN]
        found += [*names, *map(attributes.__getitem__, names)]
    return found


def _are_the_same(these: list[Any], those: list[Any]) -> bool:
    return len(these) == len(those) and all(map(operator.is_, these, those))


def _versions(tensors: Iterable[Tensor]) -> list[Any]:
    """How often each tensor was written to, and where it is; of inference tensors nobody counts the writes."""
    return [object() if t.is_inference() else (t._version, _is_strided(t) and t.data_ptr()) for t in tensors]


def _is_strided(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested


def _values(buffers: Iterable[Tensor]) -> list[Tensor]:
    """Copies: batch normalisation, and whoever writes to ``buffer.data``, does so without having it counted."""
    found: dict[Any, list[Tensor]] = {}
    for buffer in buffers:
        found.setdefault((buffer.device, buffer.dtype), []).append(buffer.detach().flatten())
    return [torch.cat(tensors) for tensors in found.values()]


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False
