"""Weights that a layer computes from other parameters, in a parametrization or in a hook before its forward."""

__all__ = [
    "cache_properties",
    "compute",
    "computed_weights",
    "detached_hook_weights",
    "layer_weight",
    "parametrizations",
    "target_of",
    "unsupported",
]

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..torch_internals import forward_pre_hooks, pruned_weight
from .settings import is_bayesian

_Hook: TypeAlias = BasePruningMethod | SpectralNorm | WeightNorm


def parametrizations(module: nn.Module) -> dict[str, ParametrizationList]:
    """Return the parametrized weights of ``module``, each with the module that computes it and holds its parameters."""
    found = module._modules.get("parametrizations")
    if not isinstance(found, nn.ModuleDict):
        return {}
    return {name: made for name, made in found.items() if isinstance(made, ParametrizationList)}


def target_of(module: nn.Module, attribute: str) -> str:
    """Name the weight of ``module`` that is made from its parameter ``attribute``: ``weight`` for ``weight_orig``."""
    return [attribute, *_made_from(module, attribute)][-1]


def computed_weights(module: nn.Module, bayesian: Iterable[str]) -> tuple[str, ...]:
    """Name the weights of ``module`` that are computed from Bayesian parameters: the ``bayesian`` ones, or a child's.

    A weight comes after those that it is computed from. They have to be computed at each read: the value that a hook
    or ``torch.nn.utils.parametrize.cached()`` has stored belongs to another draw.
    """
    below = [name for name, made in parametrizations(module).items() if any(map(is_bayesian, made.modules()))]
    hooked = {weight for attribute in bayesian for weight in _made_from(module, attribute)}
    first_to_last = sorted(sorted(hooked), key=lambda weight: -len(_made_from(module, weight)))
    return (*below, *first_to_last)


def compute(module: nn.Module, weight: str) -> Tensor:
    """Compute a weight of ``module`` from its parameters as they read now.

    Raises:
        AttributeError: It does not compute any weight of that name.
    """
    if weight in parametrizations(module):
        return parametrizations(module)[weight]()
    hook = _hooks(module).get(weight)
    if isinstance(hook, BasePruningMethod):
        return hook.apply_mask(module)
    if isinstance(hook, WeightNorm):
        return hook.compute_weight(module)
    if isinstance(hook, SpectralNorm):
        # The next forward rewrites its vectors in place, and the backward of this one may still be to come.
        vectors = {name: getattr(module, name).clone() for name in (f"{weight}_u", f"{weight}_v")}
        original = {f"{weight}_orig": getattr(module, f"{weight}_orig")}
        return hook.compute_weight(SimpleNamespace(**vectors, **original), do_power_iteration=False)  # type: ignore[arg-type]
    raise AttributeError(weight)


def layer_weight(layer: nn.Module, parameter: Tensor) -> Tensor:
    """Find a tensor of the shape of the weight to which ``parameter`` of ``layer``, such as its bias, belongs."""
    if parameter.ndim > 1:
        return parameter
    slots = [layer, *(made for name, made in parametrizations(layer).items() if name == "weight")]
    names = ("weight", "weight_v", "weight_orig", "original", "original1")
    found = (slot._parameters.get(name) for slot in slots for name in names)
    return next((weight for weight in found if weight is not None and weight.ndim > 1), parameter)


# Parameters from which a module computes a tensor that it keeps in eval, and the dictionary in which it keeps it: in
# timm's LeViT, EfficientFormerV2, EfficientViT and TinyViT.
_CACHES = {"attention_biases": "attention_bias_cache"}


def cache_properties(bayesian: Iterable[str]) -> dict[str, property]:
    """Give caches of tensors computed from Bayesian parameters a value for the mean and one for each sample."""
    return {_CACHES[attribute]: _cache_property(attribute) for attribute in bayesian if attribute in _CACHES}


def _cache_property(attribute: str) -> property:
    cache = _CACHES[attribute]

    def get(module: nn.Module) -> Any:
        value = getattr(module, attribute)
        of_sample = cache in module.__dict__ and value is not module._parameters.get(attribute)
        if of_sample and not hasattr(value, cache):
            setattr(value, cache, {})
        holder = value if of_sample else module
        if cache not in holder.__dict__:
            raise AttributeError(cache)
        return holder.__dict__[cache]

    def set_(module: nn.Module, value: Any) -> None:
        module.__dict__[cache] = value

    return property(get, set_)


def detached_hook_weights(model: nn.Module) -> dict[int, Tensor]:
    """Detach the weights that hooks have left in the layers of ``model``: by id, as the memo of a deep copy.

    They belong to the graph of a forward, and such tensors refuse to be copied.
    """
    left = (module.__dict__.get(weight) for module in model.modules() for weight in _hooks(module))
    return {id(tensor): tensor.detach().clone() for tensor in left if isinstance(tensor, Tensor)}


def unsupported(module: nn.Module) -> str | None:
    """Say why the parameters of a parametrization cannot have a Gaussian posterior; None if they can."""
    if not isinstance(module, ParametrizationList):
        return None
    for made in module:
        if getattr(getattr(made, "orthogonal_map", None), "name", "") == "householder":
            return (
                "the Householder map reads the signs on its diagonal, which noise would destroy; "
                "orthogonal_map='matrix_exp' and 'cayley' can be converted"
            )
    return None


def _hooks(module: nn.Module) -> dict[str, _Hook]:
    """Return the hooks that compute weights of ``module`` before each forward, by the weight."""
    hooks: dict[str, _Hook] = {}
    for hook in forward_pre_hooks(module).values():
        if isinstance(hook, BasePruningMethod):
            hooks[pruned_weight(hook)] = hook
        elif isinstance(hook, (WeightNorm, SpectralNorm)):
            hooks[hook.name] = hook
    return hooks


def _made_from(module: nn.Module, attribute: str) -> list[str]:
    """Name the weight that a hook computes from ``attribute``, and the one that another hook computes from that."""
    made_from = {}
    for weight, hook in _hooks(module).items():
        for ending in ("_g", "_v") if isinstance(hook, WeightNorm) else ("_orig",):
            made_from[weight + ending] = weight
    chain = [attribute]
    while chain[-1] in made_from:
        chain.append(made_from[chain[-1]])
    return chain[1:]
