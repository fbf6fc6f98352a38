"""Each private name of torch that bnnify needs, behind a function that says what it is for."""

from collections.abc import Callable, Mapping
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor as FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor as FunctionalTensor
from torch.nn.modules import module as global_hooks
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.prune import BasePruningMethod
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_unflatten as tree_unflatten

BatchOrInstanceNorm, Convolution, TransposedConvolution = _NormBase, _ConvNd, _ConvTransposeNd
"""The bases of layers that are alike."""

AttentionProjection = NonDynamicallyQuantizableLinear
"""The projection of ``nn.MultiheadAttention``, which reads its weight and never calls it."""

MODULE_STATE = vars(nn.Module()).keys()
"""The attributes that ``nn.Module`` gives every module for its own use."""

FORWARD_METHODS = ("forward", "_conv_forward", "_output_padding")
"""The methods of which the forward of a linear layer or a convolution is made up."""

OPTIMIZED_MODULE, SCRIPT_MODULE = "torch._dynamo.eval_frame.OptimizedModule", "torch.jit._script.ScriptModule"
"""The qualified names of what ``torch.compile`` and ``torch.jit.script`` make of a module."""

ACTIVATIONS = "torch._C._nn"
"""The module that activation functions written in C++ say they are from, as pickles name it."""

FLAT_WEIGHTS = "_flat_weights"
"""The attribute with the list from which a recurrent layer reads its weights."""


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
    given = dict(zip(argument_names(operator), args, strict=False)) | kwargs
    written = [a.name for a in operator._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if given.get("training"):
        written += ["running_mean", "running_var"]  # which batch normalisation does not declare
    return [given[name] for name in written if name in given]


def draws_random_numbers(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Tell whether a call of an operator draws random numbers, which attention without dropout does not."""
    if torch.Tag.nondeterministic_seeded not in operator.tags:
        return False
    defaults = {argument.name: argument.default_value for argument in operator._schema.arguments}
    given = defaults | dict(zip(defaults, args, strict=False)) | kwargs
    switches = ("dropout", "dropout_p", "train", "training")  # at zero or False nothing is drawn
    return all(given[name] for name in switches if name in given)


def writes_to(tensor: Tensor) -> int:
    """Count how often ``tensor`` was written to by operations in place; those of inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version


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
    return bool(forward_hooks(module) or forward_pre_hooks(module))


def forward_hooks(module: nn.Module) -> dict[int, Any]:
    """Give the forward hooks of ``module`` by number; deleting one there takes it off."""
    return module._forward_hooks


def forward_pre_hooks(module: nn.Module) -> dict[int, Any]:
    """Give the hooks before the forward of ``module`` by number."""
    return module._forward_pre_hooks


def pruned_weight(hook: BasePruningMethod) -> str:
    """Give the name of the weight that a hook of torch's pruning computes."""
    return hook._tensor_name


def flat_weight_names(layer: nn.RNNBase) -> list[str]:
    """Give the names of the weights of a recurrent layer, in the order in which it reads them."""
    return layer._flat_weights_names


def init_flat_weights(layer: nn.RNNBase) -> None:
    """Let a recurrent layer read the parameters that it holds now."""
    layer._init_flat_weights()


def convolve(layer: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a convolution of torch, with its padding mode, with another weight and bias."""
    return layer._conv_forward(input, weight, bias)


def output_padding(layer: Any, input: Tensor, output_size: list[int] | None) -> list[int]:
    """Compute the padding with which a transposed convolution of torch gives an output of ``output_size``."""
    shape = layer.stride, layer.padding, layer.kernel_size
    return layer._output_padding(input, output_size, *shape, len(layer.kernel_size), layer.dilation)


def operator_name(target: Any) -> str:
    """Name the ATen operator that a node of a graph calls, such as ``addmm``; empty if ``target`` is none."""
    return target._schema.name.removeprefix("aten::") if isinstance(target, torch._ops.OpOverload) else ""


def argument_names(operator: Any) -> list[str]:
    """Name the arguments of an operator, such as ``torch.ops.aten.addmm.default``, in their order."""
    return [argument.name for argument in operator._schema.arguments]


def is_compiled(module: nn.Module) -> bool:
    """Tell whether ``module.compile()`` was called, so that another function takes the place of its forward."""
    return module._compiled_call_impl is not None


def module_versions(state_dict: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return what a state_dict notes of the version of each module, by its name, which hooks after loading read."""
    return getattr(state_dict, "_metadata", None)


def set_module_versions(state_dict: Any, versions: Mapping[str, Any] | None) -> None:
    """Let a state_dict, which must not be a plain ``dict``, note the version of each module by its name."""
    state_dict._metadata = versions


def non_persistent_buffers(module: nn.Module) -> set[str]:
    """Return the names of the buffers of ``module`` itself that no state_dict holds."""
    return module._non_persistent_buffers_set


def load_own_tensors(
    module: nn.Module,
    state_dict: Mapping[str, Any],
    prefix: str,
    versions: Mapping[str, Any],
    found: tuple[list[str], list[str]],
    errors: list[str],
) -> None:
    """Load the tensors of ``module`` itself, as ``load_state_dict(assign=True)`` does for each module.

    Its own loader and hooks run. Names that are missing and names that are unexpected are appended to the two lists of
    ``found``, and tensors of another shape to ``errors``.
    """
    local = {**versions.get(prefix[:-1], {}), "assign_to_params_buffers": True}
    module._load_from_state_dict(state_dict, prefix, local, True, *found, errors)


def load_post_hooks(module: nn.Module) -> list[Callable[[nn.Module, Any], None]]:
    """Return the hooks that ``load_state_dict`` calls once ``module`` and its children are loaded."""
    return list(module._load_state_dict_post_hooks.values())


def save_in_old_format(content: Any, file: IO[bytes]) -> None:
    """Write ``content`` as ``torch.save`` did before torch 1.6, as a sequence of pickles."""
    torch.save(content, file, _use_new_zipfile_serialization=False)


def activation(name: str) -> Callable[..., Tensor]:
    """Return the activation function, such as ``"gelu"``, that modules hold and torch implements in C++."""
    return getattr(torch._C._nn, name)


def inductor() -> Any:
    """Give the compiler that writes packages and loads them, which torch imports when it is asked for."""
    return torch._inductor


def size_conditions(program: torch.export.ExportedProgram) -> list[str]:
    """The conditions on sizes under which a program is right, such as ``L['x'].size()[0] <= 10``."""
    return program._guards_code


def fsdp_gradient_divisors(module: Any) -> list[tuple[list[Tensor], float]]:
    """List the sharded parameters of ``module``, which FSDP2 manages, by group, where their gradients have a divisor.

    That is what ``set_gradient_divide_factor`` does; by default the sum over ranks is divided by their number.
    """
    return [
        ([each.sharded_param for each in group.fsdp_params], group.gradient_divide_factor)
        for group in module._get_fsdp_state()._fsdp_param_groups
        if group.gradient_divide_factor is not None
    ]


def is_fsdp_module(module: nn.Module) -> bool:
    """Tell whether FSDP1 or FSDP2 has taken over the parameters of ``module``."""
    return bool(getattr(module, "_is_fsdp_managed_module", False))


def fsdp_places(module: Any) -> list[tuple[nn.Module, str]]:
    """The modules and attributes in which FSDP2 puts the parameters that it shards as one with ``module``."""
    infos = [each._module_info for group in module._get_fsdp_state()._fsdp_param_groups for each in group.fsdp_params]
    return [(info.module, info.param_name) for info in infos]


def fsdp_look_again(module: Any) -> None:
    """Let FSDP2 note the sharded parameters that stand in ``module`` now, as it does after a load of torch's."""
    for group in module._get_fsdp_state()._fsdp_param_groups:
        for each in group.fsdp_params:
            each.reset_sharded_param()


def fsdp_mesh_ndim(module: Any) -> int:
    """The number of dimensions of the mesh over which FSDP2 shards the parameters of ``module``; 0 if it has none."""
    groups = module._get_fsdp_state()._fsdp_param_groups
    return groups[0].mesh_info.mesh.ndim if groups else 0
