"""Load original weights into a converted model, so that ρ and the prior follow them."""

__all__ = ["load_weights"]

import copy
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..draws.companions import INITIAL_STD, OF_PRIOR, PRIOR_MEAN, RHO, PriorMean
from ..draws.sharding import in_form_of, is_sharding, reshard
from ..errors import CheckpointError, check_module
from ..model import BayesianModel
from ..modules.parameters import BayesianParameter, bayesian_parameters, is_derived
from ..modules.settings import plain_class, slots_of
from ..torch_internals import fsdp_look_again, load_own_tensors, load_post_hooks, module_versions, set_module_versions
from .architectures.shapes import COUNT, abridged, printable
from .foreign.prefixes import without_wrappers
from .own_format import weights_in
from .tensor_places import TensorPlace, places_of, put, valueless_buffers


def load_weights(model: nn.Module, state_dict: Mapping[str, Any] | str | os.PathLike[str]) -> None:
    """Load pretrained weights, or a converted model's own ``state_dict``, into a converted model.

    The weights become the posterior means. Where the file has no ρ for a parameter, σ starts anew from the loaded
    weights by the rule that it was converted with, or, of a rule that knows names (``LoraStd``, ``ResponseStd``,
    ``FisherStd``), with the rms that it gave; where it has no prior mean, the loaded weights are it, but of an
    ``Elementwise`` prior, which stays as it is; and where it has no scale of the prior, that goes by σ, even if the
    weights look untrained. So a model may be converted before it has its weights, also on the meta device, where the
    tensors of the state_dict become its own. Parameters that were tied stay tied. A sharded model (FSDP2, tensor
    parallelism) is loaded by all ranks together, each of which is given the whole state_dict, such as a file that
    torch has mapped into memory (``mmap=True``), and copies its shards.

    Args:
        model: A converted model (a :class:`BayesianModel` or its ``module``).
        state_dict: Tensors under the original names, or names that the modules' own hooks and loaders bring into them;
            ``*_rho``, ``*_prior_mean``, ``*_prior_std`` and ``*_initial_std`` may be missing. The prefixes of
            wrappers, such as ``module.``, are removed. Or the path of a file of weights, also in shards, that bnnify
            or anybody else wrote: it is mapped into memory, so that of a model on the meta device whose parameters
            FSDP2 has sharded each rank reads its own part.

    Raises:
        ArgumentTypeError: ``model`` is no module.
        CheckpointError: Anything else is missing, unexpected, or of another shape; or a buffer that no state_dict holds
            has no value, because it was made on the meta device. Nothing has been loaded then.
    """
    check_module("load_weights(model)", model)
    root = model.module if isinstance(model, BayesianModel) else model
    if isinstance(state_dict, (str, os.PathLike)):
        state_dict = weights_in(state_dict, root.state_dict().keys())
    if not isinstance(state_dict, Mapping) or not all(isinstance(name, str) for name in state_dict):
        raise CheckpointError(
            f"load_weights takes a state_dict, a mapping of names to tensors; the {type(state_dict).__name__} given is "
            "none. bnnify.convert_checkpoint reads a file."
        )
    if valueless := valueless_buffers(root):
        raise CheckpointError(
            f"No state_dict holds {abridged(map(printable, valueless))}: persistent=False, and on the meta device it "
            "has no value. Give it one first, for example by making its submodule anew on a real device. Nothing was "
            "loaded."
        )
    state_dict = without_wrappers(state_dict, root.state_dict().keys())
    sharding = [module for module in root.modules() if is_sharding(module)]
    for module in sharding:
        reshard(module)
    places = places_of(root)
    try:
        absent = _assign(root, state_dict, places)
        with torch.no_grad():
            for tensor, holders in places.items():
                found = [holder.tensor for holder in holders if holder.tensor is not tensor]
                given = found[0] if found else tensor
                put(holders, given if _must_be_replaced(tensor, given) else tensor.copy_(given))
            for parameter in bayesian_parameters(root):
                _start_anew(parameter, absent)
            for holders in places.values():
                put(holders, holders[0].tensor)  # on the meta device, what was started anew is new
    finally:
        for module in sharding:
            fsdp_look_again(module)
    if isinstance(model, BayesianModel):
        if any(name.endswith(RHO) for name in absent):
            model.report = replace(model.report, tuning="")
        if any(name.endswith(INITIAL_STD) for name in absent):
            model.report = replace(model.report, untrained="")  # the prior goes by σ again


def _must_be_replaced(tensor: Tensor, given: Any) -> bool:
    """Tell whether ``tensor`` cannot take the values of ``given``: it has no memory, or another form."""
    expanded = tensor.layout == torch.strided and tensor.numel() > 1 and 0 in tensor.stride()
    return given is None or tensor.is_meta or tensor.shape != given.shape or tensor.layout != torch.strided or expanded


def _assign(root: nn.Module, state_dict: Mapping[str, Any], places: Mapping[Tensor, list[TensorPlace]]) -> set[str]:
    """Let torch put what ``state_dict`` holds in its places, as the hooks and loaders of the modules want it.

    Returns:
        The names that were given nothing, neither themselves nor under another name of what they hold.

    Raises:
        CheckpointError: It does not fit. Everything is where it was.
    """
    undo = _undo(root)
    state_dict = _in_forms_of(places, state_dict)
    found, errors = _Incompatible([], []), list[str]()
    try:
        _load(root, OrderedDict(state_dict), "", module_versions(state_dict) or {}, found, errors)
    except Exception as error:  # of a hook or loader of a module's own
        errors.append(f"{type(error).__name__}: {error}")
    missing = set(found.missing_keys)
    given = {id(tensor) for tensor, holders in places.items() if any(place.name not in missing for place in holders)}
    absent = missing - {place.name for tensor, holders in places.items() if id(tensor) in given for place in holders}
    derived = {
        place.name for holders in places.values() for place in holders if is_derived(place.module, place.attribute)
    }
    # torch itself counts from zero where an old file has no count of batches.
    needed = sorted(name for name in absent - derived if not name.endswith(COUNT))
    if needed or found.unexpected_keys or errors:
        for tensor, holders in places.items():
            put(holders, tensor)
        undo()
        complaints = {
            "missing": needed,
            "unexpected": found.unexpected_keys,
            "of another shape": _reshaped(places, state_dict) if errors else [],
            "not loaded": [" ".join(e.split())[:300].rstrip(".") for e in errors if not e.startswith("size mismatch")],
        }
        listing = "; ".join(f"{what}: {abridged(names)}" for what, names in complaints.items() if names)
        raise CheckpointError(
            f"The state_dict does not fit the model ({plain_class(root).__name__}). {listing}. Nothing was loaded."
        )
    return absent


def _undo(root: nn.Module) -> Callable[[], None]:
    """Return a function that puts back what a load changes beside putting tensors in their places."""
    modules = list(root.modules())
    pruned = [(slot.state, slot.state.has_pruned) for module in modules for slot in slots_of(module).values()]
    # A state and a loader of a module's own may write where they want to.
    extra = [(m, copy.deepcopy(m.get_extra_state())) for m in modules if _has_its_own(m, "get_extra_state")]
    own = [module for module in modules if _has_its_own(module, "_load_from_state_dict")]
    tensors = [t for module in own for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    values = [(tensor, tensor.detach().clone()) for tensor in tensors]

    def undo() -> None:
        for state, before in pruned:
            state.has_pruned = before
        for module, state in extra:
            module.set_extra_state(state)
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)

    return undo


def _has_its_own(module: nn.Module, method: str) -> bool:
    function = getattr(plain_class(module), method)
    return not function.__module__.startswith("torch.")


def _in_forms_of(places: Mapping[Tensor, list[TensorPlace]], given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return ``given`` with floating-point numbers where integers are to be weights, and shards of what is sharded."""
    own = {holder.name: tensor for tensor, holders in places.items() for holder in holders}
    formed = {}
    for name, value in given.items():
        if isinstance(value, Tensor) and name in own:
            is_integer = not (value.is_floating_point() or value.is_complex())
            wanted = value.to(own[name].dtype) if is_integer and own[name].is_floating_point() else value
            formed[name] = in_form_of(own[name], wanted)
    if all(given[name] is value for name, value in formed.items()):
        return given
    made = OrderedDict(given) | formed
    set_module_versions(made, module_versions(given))
    return made


def _reshaped(places: Mapping[Tensor, list[TensorPlace]], state_dict: Mapping[str, Any]) -> list[str]:
    return [
        f"{holder.name} {tuple(state_dict[holder.name].shape)} for {tuple(tensor.shape)}"
        for tensor, holders in places.items()
        for holder in holders
        if getattr(state_dict.get(holder.name), "shape", tensor.shape) != tensor.shape
    ]


class _Incompatible(NamedTuple):
    """Hold what torch gives to hooks after loading, under the names that it has there."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def _load(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    versions: Mapping[str, Any],
    found: _Incompatible,
    errors: list[str],
) -> None:
    """Do as ``load_state_dict(strict=False, assign=True)`` does, which looks at every name for every module."""
    load_own_tensors(module, state_dict, prefix, versions, found, errors)
    parts: dict[str, dict[str, Any]] = {}
    for name, value in state_dict.items():
        if name.startswith(prefix):
            parts.setdefault(name[len(prefix) :].partition(".")[0], OrderedDict())[name] = value
    for name, child in module._modules.items():
        if child is not None:
            _load(child, parts.get(name, OrderedDict()), f"{prefix}{name}.", versions, found, errors)
    for hook in load_post_hooks(module):
        hook(module, found)


def _start_anew(parameter: BayesianParameter, absent: set[str]) -> None:
    """Derive from the loaded mean what the file did not have: the prior mean, and ρ with the σ it starts from."""
    slots = parameter.module._parameters
    prior_mean = parameter.prior_mean
    name, mean = parameter.attribute + PRIOR_MEAN, parameter.mean.detach()
    if prior_mean is not None and parameter.prior_std is None and parameter.name + PRIOR_MEAN in absent:
        _fill(slots, name, mean.clone())
    elif prior_mean is not None and prior_mean.data_ptr() == mean.data_ptr() != 0:
        # A file may hold the two as one. (Sharded tensors have no memory of their own: 0.)
        slots[name] = PriorMean(prior_mean.clone())
    if parameter.name + INITIAL_STD in absent:
        parameter.refresh_initial_std()
    missing = [ending for ending in parameter.posterior.companions if parameter.name + ending in absent]
    if missing:
        parameter.slot.state.has_pruned = False
        first = parameter.posterior.start(mean, parameter.settings.initial_std(parameter.name, mean))
        for ending in missing:
            _fill(slots, parameter.attribute + ending, first[ending].contiguous())


def _fill(slots: dict[str, Any], name: str, value: Tensor) -> None:
    value = in_form_of(slots[name], value)
    if slots[name].is_meta:
        kind = PriorMean if name.endswith(OF_PRIOR) else nn.Parameter
        slots[name] = kind(value, requires_grad=slots[name].requires_grad)
    else:
        slots[name].copy_(value)
