"""Posteriors in two bytes a weight: means and log σ as integers of eight bits, with scales for each row."""

__all__ = ["DTYPES", "PACKED_ENDINGS", "pack", "unpack"]

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..distributions.gaussian import PRUNED, dtype_of_rho, is_pruned, log_std, rho_from_std
from ..draws.companions import PRIOR_MEAN, RHO
from ..errors import CheckpointError
from ..modules.settings import Settings
from .foreign.layout import place_of

DTYPES = ("int8",)
"""The dtypes, other than its own, in which a model can be saved."""

# No module holds these names: a parameter is no module, whose name could be followed by a dot.
_CODES, _SCALE, _RANGE = ".int8", ".scale", ".range"
_STEPS = 127
_PRUNED_CODE = -128
_OWN_DTYPES = {str(dtype): dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
PACKED_ENDINGS = (_CODES, _SCALE, RHO + _CODES, RHO + _RANGE, PRIOR_MEAN + _CODES, PRIOR_MEAN + _SCALE)
"""The endings of the names in a file under which the parts of one parameter stand."""


def pack(
    state_dict: Mapping[str, Tensor], settings: Mapping[str, Settings]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Write the Bayesian weights of ``state_dict`` in int8; those of one dimension, such as biases, stay.

    A row is what belongs to one place of the first dimension. In a row μ = scale · code, so that zero stays zero, and
    log σ is one of 255 steps from its least to its largest; a code of its own marks pruned weights. What μ differs by
    from the mean of the prior is written like μ, or not at all where it is zero throughout.

    Returns:
        The tensors to write, a tied one once, and for each of these weights their dtype and the error that is made:
        ``mean_error`` in units of the rms of μ and ``std_error`` relative to each σ, the largest and the rms.

    Raises:
        CheckpointError: A weight is NaN or infinite.
    """
    packed: Any = copy.copy(state_dict)  # unlike a new dict, with what torch notes about the versions of the modules
    record: dict[str, dict[str, Any]] = {}
    made: dict[Any, tuple[dict[str, Tensor], dict[str, Any]]] = {}
    for name in settings:
        mean = state_dict[name]
        if mean.ndim < 2 or mean.numel() == 0 or str(mean.dtype) not in _OWN_DTYPES:
            continue
        own = {ending: packed.pop(name + ending, None) for ending in ("", RHO, PRIOR_MEAN)}
        place = place_of(mean) or name
        if place not in made:
            made[place] = _pack_one(name, {e: tensor.detach().cpu() for e, tensor in own.items() if tensor is not None})
        tensors, record[name] = made[place]
        packed.update({name + ending: tensor for ending, tensor in tensors.items()})
    return packed, record


def _pack_one(name: str, own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not all(tensor.isfinite().all() for tensor in own.values()):
        raise CheckpointError(f"Cannot save `{name}` in int8: it has values, or a ρ, that are NaN or infinite.")
    mean = own[""]
    tensors = _symmetric(mean.double(), mean.dtype)
    found = _linear(tensors[_CODES], tensors[_SCALE]).to(mean.dtype)
    difference = (found.double() - mean.double()).abs()
    size = mean.double().square().mean().sqrt().item() or 1.0
    entry: dict[str, Any] = {
        "dtype": str(mean.dtype),
        "mean_error": [each / size for each in _largest_and_rms(difference)],
    }
    if RHO in own:
        rho = own[RHO]
        tensors |= {RHO + ending: tensor for ending, tensor in _stepped(rho).items()}
        found = _rho(tensors[RHO + _CODES], tensors[RHO + _RANGE], dtype_of_rho(mean.dtype))
        ratio = log_std(found.double()) - log_std(rho.double())
        entry["std_error"] = _largest_and_rms(ratio.expm1().abs()[~is_pruned(rho)])
    if PRIOR_MEAN in own and not torch.equal(own[PRIOR_MEAN], mean):
        distance = mean.double() - own[PRIOR_MEAN].double()
        tensors |= {PRIOR_MEAN + ending: tensor for ending, tensor in _symmetric(distance, mean.dtype).items()}
    return tensors, entry


def _symmetric(values: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Codes from -127 to 127 and the scale of each row."""
    scale = (values.abs().flatten(1).amax(1) / _STEPS).to(torch.promote_types(dtype, torch.float32))
    codes = (values / _by_rows(scale, values)).nan_to_num(nan=0.0).round().clamp(-_STEPS, _STEPS)
    return {_CODES: codes.to(torch.int8), _SCALE: scale}


def _stepped(rho: Tensor) -> dict[str, Tensor]:
    """Codes of log σ, and its least and largest in each row."""
    logs, pruned = log_std(rho.double()), is_pruned(rho)
    low = logs.masked_fill(pruned, math.inf).flatten(1).amin(1)
    high = logs.masked_fill(pruned, -math.inf).flatten(1).amax(1)
    bounds = torch.stack([low, high], 1).nan_to_num(posinf=0.0, neginf=0.0).float()  # of a row that is pruned: 0
    low, high = (_by_rows(bound.double(), rho) for bound in bounds.unbind(1))
    share = ((logs - low) / (high - low)).nan_to_num(nan=0.0, posinf=1.0, neginf=0.0).clamp(0.0, 1.0)
    codes = (share * 2 * _STEPS).round() - _STEPS
    return {_CODES: codes.masked_fill(pruned, _PRUNED_CODE).to(torch.int8), _RANGE: bounds}


def unpack(state_dict: dict[str, Tensor], settings: Mapping[str, Settings], record: Mapping[str, Any]) -> None:
    """Put the weights that :func:`pack` wrote into ``state_dict`` again; a mean and its prior's may share memory.

    Raises:
        CheckpointError, KeyError, TypeError: The data are damaged.
    """
    made: dict[Any, dict[str, Tensor]] = {}
    for name, entry in record.items():
        own = {e: state_dict.pop(name + e) for e in PACKED_ENDINGS if name + e in state_dict}
        place = place_of(own[_CODES]) or name
        if place not in made:
            made[place] = _unpack_one(own, _OWN_DTYPES[entry["dtype"]], settings[name].prior.centred)
        state_dict.update({name + ending: tensor for ending, tensor in made[place].items()})


def _unpack_one(own: Mapping[str, Tensor], dtype: torch.dtype, centred: bool) -> dict[str, Tensor]:
    shape = own[_CODES].shape
    for ending in ("", PRIOR_MEAN):
        if ending + _CODES in own:
            _check(own[ending + _CODES], own[ending + _SCALE], shape, (*shape[:1],))
    if RHO + _CODES in own:
        _check(own[RHO + _CODES], own[RHO + _RANGE], shape, (*shape[:1], 2))
    wide_mean = _linear(own[_CODES], own[_SCALE])
    tensors = {"": wide_mean.to(dtype)}
    if RHO + _CODES in own:
        tensors[RHO] = _rho(own[RHO + _CODES], own[RHO + _RANGE], dtype_of_rho(dtype))
    if PRIOR_MEAN + _CODES in own:
        tensors[PRIOR_MEAN] = (wide_mean - _linear(own[PRIOR_MEAN + _CODES], own[PRIOR_MEAN + _SCALE])).to(dtype)
    elif centred:
        tensors[PRIOR_MEAN] = tensors[""]
    return tensors


def _check(codes: Tensor, scales: Tensor, shape: torch.Size, scales_shape: tuple[int, ...]) -> None:
    """Raise a CheckpointError for what :func:`pack` has not written."""
    are_codes = codes.dtype == torch.int8 and codes.shape == shape and len(shape) > 1
    if not (are_codes and scales.is_floating_point() and scales.shape == scales_shape):
        raise CheckpointError("weights in int8 and their scales do not fit")


def _linear(codes: Tensor, scale: Tensor) -> Tensor:
    return codes * _by_rows(scale, codes)


def _rho(codes: Tensor, bounds: Tensor, dtype: torch.dtype) -> Tensor:
    low, high = (_by_rows(bound.double(), codes) for bound in bounds.unbind(1))
    logs = torch.lerp(low, high, (codes.double() + _STEPS) / (2 * _STEPS))
    return rho_from_std(logs.exp()).to(dtype).masked_fill(codes == _PRUNED_CODE, PRUNED)


def _by_rows(values: Tensor, like: Tensor) -> Tensor:
    """One value for each row of ``like``, in a shape that broadcasts to it."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _largest_and_rms(errors: Tensor) -> list[float]:
    return [errors.max().item(), errors.square().mean().sqrt().item()] if errors.numel() else [0.0, 0.0]
