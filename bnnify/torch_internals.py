"""Each private name of torch that bnnify needs, behind a function that says what it is for."""

__all__ = [
    "FakeTensor",
    "FunctionalTensor",
    "TorchDispatchMode",
    "after_this_backward",
    "backward_pass",
    "current_function",
    "has_global_hooks",
    "has_own_hooks",
    "in_transform",
    "is_accumulation",
    "is_batched",
    "is_compiled",
    "is_observed",
    "is_traced",
    "is_transformed",
    "keeps_graph",
    "may_save_for_rerun",
    "memory_is_shared",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
    "unwrapped",
    "written_arguments",
]

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as global_hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten


def is_observed() -> bool:
    """Tell whether a transform, tracer, compiler, mode or autocast follows or changes what torch does here.

    Under autocast, an operator that calls others computes something else when a mode has passed it on.
    """
    return (
        torch.compiler.is_compiling()
        or torch.is_inference_mode_enabled()
        or torch._C._is_tracing()
        or torch._C._is_any_autocast_enabled()
        or in_transform()
        or torch._C._len_torch_dispatch_stack() > 0
        or any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())
    )


def is_traced() -> bool:
    """Tell whether a mode is in effect in which tensors have no values or operations become a graph."""
    if torch._C._len_torch_dispatch_stack() == 0:
        return False
    keys = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(key) is not None for key in (keys.FAKE, keys.PROXY, keys.FUNCTIONAL))


def is_transformed(tensor: Tensor) -> bool:
    """Tell whether ``tensor`` belongs to a transform of ``torch.func``, and has no memory of its own."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def written_arguments(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments of a call of an operator, such as ``torch.ops.aten.add_.Tensor``, to which it writes."""
    arguments = operator._schema.arguments
    given = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
    written = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    if given.get("training"):
        written += ["running_mean", "running_var"]  # which batch normalisation does not declare
    return [given[name] for name in written if name in given]


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor that the transforms of ``torch.func`` around here were given."""
    while is_transformed(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def is_batched(*gradients: Tensor | None) -> bool:
    """Tell whether a pass computes many gradients at once (``is_grads_batched``, ``vmap``), none of them in place."""
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
    """Tell whether a node of the graph adds a gradient to a leaf, and runs no code of a forward again."""
    return isinstance(node, torch._C._functions.AccumulateGrad)


def keeps_graph() -> bool:
    """Tell whether another backward pass may go where this one does."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def may_save_for_rerun() -> bool:
    """Tell whether hooks for saved tensors are in effect, as in a region that checkpointing may run again."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def in_transform() -> bool:
    """Tell whether a transform of ``torch.func`` runs this code, where the values of tensors are not at hand."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def memory_is_shared(tensor: Tensor) -> bool:
    """Tell whether another tensor, such as a view, uses the memory of ``tensor``."""
    # One reference is that of the tensor, another one that of the storage that is asked here.
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) > 2


def has_global_hooks() -> bool:
    """Tell whether forward hooks are registered that run for every module."""
    return bool(global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks)


def has_own_hooks(module: nn.Module) -> bool:
    """Tell whether ``module`` has forward hooks of its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def is_compiled(module: nn.Module) -> bool:
    """Tell whether ``module.compile()`` was called, so that another function takes the place of its forward."""
    return module._compiled_call_impl is not None
