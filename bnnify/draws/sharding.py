"""Sharded parameters (FSDP2 and other DTensors): their noise, and the forms in which they are read."""

__all__ = [
    "in_form_of",
    "is_distributed",
    "is_sharding",
    "is_unsharded_form",
    "ranks_together",
    "reshard",
    "sharded_noise",
    "unsharded",
    "whole",
]

import math
import weakref
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..torch_internals import fsdp_gradient_divisors
from .processes import seed_of_process

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_distributed(tensor: Any) -> "TypeGuard[DTensor]":
    """Tell, without importing DTensor, whether ``tensor`` is one."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered from the ranks if it is a DTensor."""
    return tensor.full_tensor() if is_distributed(tensor) else tensor


def in_form_of(other: Tensor, tensor: Tensor) -> Tensor:
    """Shard ``tensor``, which each rank has whole, as ``other`` is; return it as it stands if that is not sharded."""
    if not is_distributed(other):
        return tensor
    if is_distributed(tensor):
        return tensor.redistribute(other.device_mesh, other.placements)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def sharded_noise(tensor: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """ε ~ N(0, 1) of a DTensor. Every shard gets noise of its own, and the replicas of a shard get the same."""
    from torch.distributed import broadcast
    from torch.distributed.tensor import DTensor

    tensor = cast(DTensor, tensor.detach())
    mesh, local = tensor.device_mesh, tensor.to_local()
    # Neither may hang on how the ranks were seeded. On a CPU mesh DTensor's own generators give shards equal noise when
    # the seeds are equal; on any mesh they give replicas unequal noise when the seeds differ, and ρ would drift apart.
    seed, shard = torch.randint(2**62, (), generator=generator, device=generator.device if generator else "cpu"), 0
    if generator is None:
        seed = torch.tensor(seed_of_process(int(seed)), device="cpu")
    for dim, placement in enumerate(tensor.placements):
        if not placement.is_replicate():
            shard = shard * mesh.size(dim) + mesh.get_local_rank(dim)
        elif mesh.size(dim) > 1:
            seed = seed.to(local.device)
            broadcast(seed, group=mesh.get_group(dim), group_src=0)
    of_shard = torch.Generator(local.device).manual_seed(int(seed) + shard)
    noise = torch.empty_like(local).normal_(generator=of_shard)
    return DTensor.from_local(noise, mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride())


def is_unsharded_form(value: Tensor, mean: Tensor) -> bool:
    """Tell whether FSDP has put the gathered parameter in the place of the sharded one that was sampled."""
    return (
        is_distributed(mean)
        and isinstance(value, nn.Parameter)
        and getattr(value, "device_mesh", None) != mean.device_mesh
        and value.shape == mean.shape
    )


def unsharded(drawn: Tensor, value: Tensor, mean: Tensor) -> Tensor:
    """Gather the sample into the form of ``value``, to which FSDP has gathered the ``mean``."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    # Each rank has its own data, so the gradient is the mean over ranks; without the placement it would not be reduced.
    drawn = cast(DTensor, drawn)
    # What tensor parallelism has split stays so; its dimensions of the mesh come after those of FSDP.
    kept = value.placements if isinstance(value, DTensor) else ()
    gathered = drawn.device_mesh.ndim - len(kept)
    split = drawn.redistribute(placements=[Replicate()] * gathered + [*kept])
    full = split.to_local(grad_placements=[Partial("avg")] * gathered + [*kept])
    divisor = _divisors.get(mean)
    if divisor is not None and full.requires_grad:
        scale = math.prod(drawn.device_mesh.shape[:gathered]) / divisor
        full.register_hook(lambda grad: grad * scale)
    if isinstance(value, DTensor):
        full = DTensor.from_local(full, value.device_mesh, kept, shape=value.shape, stride=value.stride())
    return full.to(value.dtype)  # FSDP's mixed precision


def is_sharding(module: nn.Module) -> bool:
    """Tell, without importing FSDP, whether FSDP2 manages the parameters of ``module``."""
    return hasattr(type(module), "set_reshard_after_forward")


def reshard(module: Any) -> None:
    """Make ``module``, which FSDP2 manages, hold its sharded parameters.

    Between a forward and the backward pass FSDP may leave the gathered ones in place, and it collects their gradients
    when the backward pass leaves the module: a sample or KL taken from them would get its gradient too late.
    """
    if module not in _set_up_by_fsdp:
        if any(parameter.is_meta for parameter in module.parameters()):
            return  # they have no values yet, and nobody can have gathered them
        # FSDP reads the parameters of a group by their names when it first gathers them: that has to be outside a draw.
        _set_up_by_fsdp.add(module)
        module.unshard()
    module.reshard()
    for parameters, divisor in fsdp_gradient_divisors(module):
        for parameter in parameters:
            _divisors[parameter] = divisor


def ranks_together(module: nn.Module, of_fsdp: int) -> tuple[list[Any], int | None]:
    """Find the ranks that hold a parameter of ``module`` together with this one, by tensor parallelism.

    The first ``of_fsdp`` dimensions of its mesh are those of FSDP, whose ranks have data of their own.

    Returns:
        The process groups that join them, and the lowest of these ranks; None if there is no such parameter.
    """
    for parameter in module._parameters.values():
        if not is_distributed(parameter):
            continue
        mesh, coordinate = parameter.device_mesh, parameter.device_mesh.get_coordinate()
        if coordinate is not None and mesh.ndim > of_fsdp:
            ranks = mesh.mesh[tuple(coordinate[:of_fsdp])]
            return [mesh.get_group(dim) for dim in range(of_fsdp, mesh.ndim)], int(ranks.min())
    return [], None


_set_up_by_fsdp: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_divisors = WeakIdKeyDictionary()
"""By what the sum of the gradients of a parameter is divided, where FSDP was told so."""
