"""Original weights into a converted model, so that ρ and the prior follow them."""

__all__ = ["load_weights"]

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .companions import PriorMean
from .errors import CheckpointError
from .model import BayesianModel
from .parameters import INITIAL_STD, PRIOR_MEAN, RHO, BayesianParameter, bayesian_parameters
from .selection import Holder, holders_by_parameter


def load_weights(model: nn.Module, state_dict: Mapping[str, Any], *, share: bool = False) -> None:
    """Load pretrained weights, or a converted model's own ``state_dict``, into a converted model.

    The weights become the posterior means. Where the file has no ρ for a parameter, σ starts anew from the loaded
    weights by the rule that it was converted with; where it has no prior mean, the loaded weights are it, and where it
    has no scale of the prior, that follows them. So a model may be converted before it has its weights, also on the
    meta device, where the tensors of the state_dict become its own. Parameters that were tied stay tied.

    Args:
        model: A converted model (a :class:`BayesianModel` or its ``module``).
        state_dict: Tensors under the original names; ``*_rho``, ``*_prior_mean`` and ``*_initial_std`` may be missing.
        share: Let a prior mean be the memory of the mean itself, for a model that is only to be written to a file:
            what trains the one would move the other. Default: ``False``.

    Raises:
        CheckpointError: Anything else is missing, unexpected, or of another shape; or a buffer that no state_dict holds
            has no value, because it was made on the meta device. Nothing has been loaded then.
    """
    root = model.module if isinstance(model, BayesianModel) else model
    _refuse_valueless_buffers(root)
    own = root.state_dict(keep_vars=True)
    # A file may name a tied parameter once: what is given under one of its names is given under all.
    given_ids = {id(tensor) for name, tensor in own.items() if name in state_dict}
    absent = {name for name, tensor in own.items() if id(tensor) not in given_ids}
    derived = {id(tensor) for p in bayesian_parameters(root) for tensor in (p.rho, p.prior_mean, p.initial_std)}
    # torch itself counts from zero where an old file has no count of batches.
    needed = {n for n in absent if id(own[n]) not in derived and not n.endswith("num_batches_tracked")}
    _compare(own, state_dict, needed)
    ties = [places for places in holders_by_parameter(root).values() if len(places) > 1]
    root.load_state_dict(state_dict, strict=False, assign=any(tensor.is_meta for tensor in root.parameters()))
    _tie(ties, state_dict)
    with torch.no_grad():
        for parameter in bayesian_parameters(root):
            _start_anew(parameter, absent, share)
    _tie(ties, state_dict)  # on the meta device, what was started anew is new


def _compare(own: Mapping[str, Any], given: Mapping[str, Any], missing: set[str]) -> None:
    """Raise unless ``given`` can be loaded whole."""
    complaints = {
        "missing": sorted(missing),
        "unexpected": [name for name in given if name not in own],
        "of another shape": [
            f"{name} {tuple(given[name].shape)} for {tuple(own[name].shape)}"
            for name in own
            if name in given and isinstance(own[name], Tensor) and own[name].shape != getattr(given[name], "shape", ())
        ],
    }
    if any(complaints.values()):
        listing = "; ".join(f"{what}: {', '.join(names)}" for what, names in complaints.items() if names)
        raise CheckpointError(f"The state_dict does not fit the model. {listing}. Nothing was loaded.")


def _refuse_valueless_buffers(root: nn.Module) -> None:
    """Raise for a buffer on the meta device to which no state_dict can give a value."""
    valueless = [
        f"`{name}.{attribute}`".replace("`.", "`")
        for name, module in root.named_modules()
        for attribute, buffer in module._buffers.items()
        if buffer is not None and buffer.is_meta and attribute in module._non_persistent_buffers_set
    ]
    if valueless:
        raise CheckpointError(
            f"No state_dict holds {', '.join(valueless)}: persistent=False, and on the meta device it has no value. "
            "Give it one first, for example by making its submodule anew on a real device. Nothing was loaded."
        )


def _tie(ties: list[list[Holder]], given: Mapping[str, Any]) -> None:
    """Make each group of places hold one parameter again: the one that was given."""
    for places in ties:
        source = next((place for place in places if given.keys() & set(place.names)), places[0])
        initial_std = source.module._buffers.get(source.attribute + INITIAL_STD)
        for place in places:
            place.module._parameters[place.attribute] = source.module._parameters[source.attribute]
            if initial_std is not None:
                place.module._buffers[place.attribute + INITIAL_STD] = initial_std


def _start_anew(parameter: BayesianParameter, absent: set[str], share: bool) -> None:
    """Derive from the loaded mean what the file did not have: the prior mean, and ρ with the σ it starts from."""
    slots = parameter.module._parameters
    prior_mean = parameter.prior_mean
    name, mean = parameter.attribute + PRIOR_MEAN, parameter.mean.detach()
    if prior_mean is not None and parameter.name + PRIOR_MEAN in absent:
        _fill(slots, name, mean if share else mean.clone(), share)
    elif prior_mean is not None and prior_mean.data_ptr() == mean.data_ptr() != 0 and not share:
        # A file may hold the two as one. (Sharded tensors have no memory of their own: 0.)
        slots[name] = PriorMean(prior_mean.clone())
    if parameter.name + INITIAL_STD in absent:
        parameter.refresh_initial_std()
    if parameter.name + RHO in absent:
        parameter.settings.pruned = False
        rho = parameter.settings.initial_rho(parameter.name, parameter.mean)
        _fill(slots, parameter.attribute + RHO, rho.expand_as(parameter.mean).contiguous())


def _fill(slots: dict[str, Any], name: str, value: Tensor, replace: bool = False) -> None:
    if slots[name].is_meta or replace:
        kind = PriorMean if name.endswith(PRIOR_MEAN) else nn.Parameter
        slots[name] = kind(value, requires_grad=slots[name].requires_grad)
    else:
        slots[name].copy_(value)
