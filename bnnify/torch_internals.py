"""Each private name of torch that newer code of bnnify needs, behind a function that says what it is for."""

__all__ = [
    "FakeTensor",
    "FunctionalTensor",
    "after_this_backward",
    "backward_pass",
    "current_function",
    "is_accumulation",
    "is_batched",
    "is_compiled_module",
    "is_observed",
    "is_traced",
    "is_transformed",
    "keeps_graph",
    "may_save_for_rerun",
    "under_transform",
    "unwrapped",
    "written_arguments",
]

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext


def is_observed() -> bool:
    """Whether somebody follows or changes what torch does here: a transform, a tracer, a compiler, a mode, autocast.

    Under autocast, an operator that calls others computes something else when a mode has passed it on.
    """
    return (
        torch.compiler.is_compiling()
        or torch.is_inference_mode_enabled()
        or torch._C._is_tracing()
        or torch._C._is_any_autocast_enabled()
        or under_transform()
        or torch._C._len_torch_dispatch_stack() > 0
        or any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())
    )


def is_traced() -> bool:
    """Whether a mode is in effect under which tensors have no values, or operations are written down as a graph."""
    if torch._C._len_torch_dispatch_stack() == 0:
        return False
    keys = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(key) is not None for key in (keys.FAKE, keys.PROXY, keys.FUNCTIONAL))


def is_transformed(tensor: Tensor) -> bool:
    """Whether ``tensor`` belongs to a transform of ``torch.func``, and has no memory of its own."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def written_arguments(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments of a call of an operator, such as ``torch.ops.aten.add_.Tensor``, to which it writes."""
    arguments = operator._schema.arguments
    given = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
    written = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    if given.get("training"):
        written += ["running_mean", "running_var"]  # which batch normalisation does not declare
    return [given[name] for name in written if name in given]


def under_transform() -> bool:
    """Whether code runs inside a transform of ``torch.func``, such as ``vmap`` or ``grad``."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor that the transforms of ``torch.func`` around here were given."""
    while is_transformed(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def is_batched(*gradients: Tensor | None) -> bool:
    """Whether a pass computes many gradients at once (``is_grads_batched``, ``vmap``); then none can go in place."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    given = (each for each in gradients if each is not None)
    return any(functorch.is_batchedtensor(each) or functorch.is_legacy_batchedtensor(each) for each in given)


def backward_pass() -> int | None:
    """The id of the backward pass that this thread is executing; None outside of one."""
    task = torch._C._current_graph_task_id()
    return None if task == -1 else task


def after_this_backward(callback: Callable[[], None]) -> None:
    """Let autograd hold ``callback`` for as long as the backward pass that runs now, and call it if that succeeds."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def current_function() -> Any:
    """The node of the graph whose backward is being executed in this thread; None if there is none."""
    return torch._C._current_autograd_node()


def is_accumulation(node: Any) -> bool:
    """Whether a node of the graph adds a gradient to a leaf, and runs no code of a forward again."""
    return isinstance(node, torch._C._functions.AccumulateGrad)


def keeps_graph() -> bool:
    """Whether another backward pass may go where this one does."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def may_save_for_rerun() -> bool:
    """Whether hooks for saved tensors are in effect, as in a region that activation checkpointing may run again."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def is_compiled_module(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called, so that a call of it runs compiled code."""
    return module._compiled_call_impl is not None
