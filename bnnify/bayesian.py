"""How a module becomes Bayesian: a subclass of its own class, in which reading a weight gives the draw's sample."""

__all__ = [
    "PRIOR_MEAN",
    "RHO",
    "BayesianParameter",
    "bayesian_class",
    "bayesian_parameters",
    "Settings",
    "initial_rho",
    "initial_std",
    "is_derived",
    "become_bayesian",
    "become_plain",
    "is_bayesian",
    "unique_bayesian_parameters",
]

import functools
import types
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from .draw import Active, read
from .errors import ConversionError, DrawError
from .posterior import PosteriorStd, fan_in_scale, rho_from_std, rms
from .priors import Posterior, Prior

RHO, PRIOR_MEAN = "_rho", "_prior_mean"
"""What follows a parameter's own name in the name of its ρ, and of the pretrained value that a centred prior keeps."""


@dataclass(eq=False)
class Settings:
    """How one parameter of one module is Bayesian, and what reading it gives at the moment."""

    prior: Prior
    posterior_std: PosteriorStd
    estimator: str
    initial_std: float
    active: Active = field(default_factory=Active)

    def __str__(self) -> str:
        return f"{self.estimator}, prior={self.prior}, std={self.posterior_std}"

    def copy(self) -> "Settings":
        """The same settings for another place that holds the same parameter."""
        return Settings(self.prior, self.posterior_std, self.estimator, self.initial_std)


@dataclass(frozen=True)
class BayesianParameter:
    """One Bayesian parameter of a converted model, looked at where it stands now.

    Attributes:
        name: The qualified name, such as ``layer1.0.conv1.weight``.
        module: The module that holds it.
        attribute: Its name there, such as ``weight``.
    """

    name: str
    module: nn.Module
    attribute: str

    @property
    def settings(self) -> Settings:
        return settings_of(self.module)[self.attribute]

    @property
    def active(self) -> Active:
        return self.settings.active

    @property
    def mean(self) -> Tensor:
        """The posterior mean: the parameter itself, whatever draw is in effect."""
        return cast(Tensor, self.module._parameters[self.attribute])

    @property
    def rho(self) -> Tensor:
        """ρ; the posterior's standard deviation is softplus(ρ)."""
        return cast(Tensor, self.module._parameters[self.attribute + RHO])

    @property
    def prior_mean(self) -> Tensor | None:
        return self.module._parameters.get(self.attribute + PRIOR_MEAN)

    def refresh_initial_std(self) -> None:
        """Let the prior that takes its scale from the initial σ follow pretrained weights that were loaded just now."""
        weights = self.mean if self.prior_mean is None else self.prior_mean
        self.settings.initial_std = rms(initial_std(weights, self.module, self.settings.posterior_std))

    def kl(self) -> Tensor:
        """KL(q‖p) of this parameter in nats, summed over its elements."""
        settings = self.settings
        kl = settings.prior.kl(Posterior(self.mean, self.rho, self.prior_mean, settings.initial_std))
        # Of a sharded parameter it is a sum of which every rank has computed its part.
        return kl.full_tensor() if hasattr(kl, "full_tensor") else kl


def bayesian_parameters(root: nn.Module) -> Iterator[BayesianParameter]:
    """Every Bayesian parameter under ``root``, a tied one once for each module that holds it.

    Where FSDP2 has sharded a module under ``root``, it is the sharded parameter.

    Raises:
        DrawError: A module was changed after its conversion in a way that took the parameter out of its hands.
    """
    for module_name, module in root.named_modules():
        if hasattr(type(module), "set_reshard_after_forward"):  # an FSDPModule, told without importing FSDP
            _reshard(module)
        for attribute in settings_of(module):
            mean = module._parameters.get(attribute)
            if mean is None and attribute in module._parameters:
                continue  # a bias that was set to None
            rho = module._parameters.get(attribute + RHO)
            name = f"{module_name}.{attribute}" if module_name else attribute
            if mean is None or rho is None or mean.shape != rho.shape:
                _refuse_surgery(name, module, attribute)
            yield BayesianParameter(name, module, attribute)


def unique_bayesian_parameters(root: nn.Module) -> Iterator[BayesianParameter]:
    """Every Bayesian parameter under ``root`` once, under the first of its names."""
    seen = set()
    for parameter in bayesian_parameters(root):
        if id(parameter.mean) not in seen:
            seen.add(id(parameter.mean))
            yield parameter


def is_bayesian(module: nn.Module) -> bool:
    """Whether ``module`` itself (not only a child of it) has Bayesian parameters."""
    return hasattr(type(module), "_plain_class")


def settings_of(module: nn.Module) -> dict[str, Settings]:
    """The Bayesian parameters of ``module`` itself, by attribute, with their settings; empty for a plain module."""
    return module.__dict__["_bayesian"] if is_bayesian(module) else {}


def is_derived(module: nn.Module, attribute: str) -> bool:
    """Whether this parameter of ``module`` is the ρ or the prior mean of another one."""
    return any(attribute in (name + RHO, name + PRIOR_MEAN) for name in settings_of(module))


def become_bayesian(
    module: nn.Module,
    attribute: str,
    settings: Settings,
    rho: nn.Parameter,
    prior_mean: nn.Parameter | None,
) -> None:
    """Make one parameter of ``module`` Bayesian in place; the parameter stays where it is, as the posterior mean."""
    bayesian = {**settings_of(module), attribute: settings}
    plain = _plain_class(type(module))
    module.__class__ = bayesian_class(plain, tuple(bayesian))
    module.__dict__["_bayesian"] = bayesian
    module.register_parameter(attribute + RHO, rho)
    if prior_mean is not None:
        module.register_parameter(attribute + PRIOR_MEAN, prior_mean)
    if isinstance(module, nn.RNNBase):
        module.__dict__.pop("_flat_weights", None)


def become_plain(module: nn.Module) -> None:
    """Undo :func:`become_bayesian` in place: the class it had, and the posterior means as its parameters."""
    for attribute in settings_of(module):
        del module._parameters[attribute + RHO]
        module._parameters.pop(attribute + PRIOR_MEAN, None)
    del module.__dict__["_bayesian"]
    module.__class__ = _plain_class(type(module))
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


@functools.cache
def bayesian_class(plain: type[nn.Module], attributes: tuple[str, ...]) -> type[nn.Module]:
    """The subclass of ``plain`` in which ``attributes`` are Bayesian: reading one gives the sample of the draw.

    Example::

        >>> issubclass(bayesian_class(nn.Linear, ("weight", "bias")), nn.Linear)
        True
    """
    namespace: dict[str, Any] = {attribute: _bayesian_property(attribute) for attribute in attributes}
    if issubclass(plain, nn.RNNBase):
        namespace["_flat_weights"] = property(_flat_weights, lambda module, value: None)

    def extra_repr(self: nn.Module) -> str:
        described = [f"{name}: {settings}" for name, settings in settings_of(self).items()]
        return "; ".join(filter(None, [plain.extra_repr(self), *described]))

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        reduced = plain.__reduce_ex__(self, protocol)
        if type(self) is not made:
            return reduced  # a subclass somebody wrote, which pickle finds by its name
        constructor, arguments, *state = cast(tuple[Any, ...], reduced)
        arguments = tuple(plain if argument is made else argument for argument in arguments)
        return _rebuild, (plain, attributes, constructor, arguments), *state

    def load_from_state_dict(self: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        plain._load_from_state_dict(self, state_dict, prefix, *args)
        for name in settings_of(self):
            if f"{prefix}{name}{PRIOR_MEAN}" in state_dict:
                BayesianParameter(prefix + name, self, name).refresh_initial_std()

    namespace["_load_from_state_dict"] = load_from_state_dict
    namespace |= {"_plain_class": plain, "extra_repr": extra_repr, "__reduce_ex__": reduce_ex}
    namespace |= {"__module__": plain.__module__, "__doc__": plain.__doc__}
    # Through the metaclass, which need not be `type`: a module may also be an abstract base class.
    made: type[nn.Module] = types.new_class(
        f"Bayesian{plain.__name__}", (plain,), exec_body=lambda ns: ns.update(namespace)
    )
    return made


def initial_std(mean: Tensor, module: nn.Module, rule: PosteriorStd) -> Tensor:
    """The σ with which ``rule`` starts the posterior of ``mean``, a parameter of ``module``: a scalar, or as many."""
    layer_weight = mean if mean.ndim > 1 else module._parameters.get("weight")
    std = torch.as_tensor(
        rule(mean.detach(), fan_in_scale(mean if layer_weight is None else layer_weight)), device=mean.device
    )
    if std.shape not in ((), mean.shape) or not (std.is_meta or (std >= 0).all()):
        raise ConversionError(
            f"posterior_std={rule} gives a parameter of {type(module).__name__} with shape {tuple(mean.shape)} a σ of "
            f"shape {tuple(std.shape)}, or one that is negative or NaN. Return a scalar or one σ for each weight."
        )
    return std


def initial_rho(mean: Tensor, std: Tensor) -> Tensor:
    """The ρ of ``mean``'s shape, dtype and device that gives the posterior this σ."""
    return rho_from_std(std.to(mean.dtype)).expand_as(mean).contiguous()


def _bayesian_property(attribute: str) -> property:
    def get(module: nn.Module) -> Tensor | None:
        if attribute in module._parameters:
            value = module._parameters[attribute]
            return None if value is None else read(settings_of(module)[attribute].active, value)
        try:
            return cast(Tensor, module.__dict__[attribute])
        except KeyError:
            raise AttributeError(attribute) from None

    def set_(module: nn.Module, value: Any) -> None:
        # Parameters never come here: nn.Module registers them. A plain tensor does when a hypernetwork, pruning or
        # weight_norm has removed the parameter; the next draw decides whether that can be lived with.
        module.__dict__[attribute] = value

    return property(get, set_)


_set_up_by_fsdp: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _reshard(module: Any) -> None:
    """Let ``module``, which FSDP2 manages, hold its sharded parameters.

    Between a forward and the backward pass FSDP may leave the gathered ones in place, and it collects their gradients
    when the backward pass leaves the module: a sample or KL taken from them would get its gradient too late.
    """
    if module not in _set_up_by_fsdp:
        # FSDP reads the parameters of a group by their names when it first gathers them: outside any draw, please.
        _set_up_by_fsdp.add(module)
        module.unshard()
    module.reshard()


def _flat_weights(module: Any) -> list[Tensor | None]:
    """The list from which recurrent layers read their weights, read anew so that it holds the draw's samples."""
    return [getattr(module, name, None) for name in module._flat_weights_names]


def _plain_class(cls: type) -> type:
    return getattr(cls, "_plain_class", cls)


def _rebuild(plain: type[nn.Module], attributes: tuple[str, ...], constructor: Any, arguments: tuple[Any, ...]) -> Any:
    """Unpickle in any process: make an object of the plain class, then let it become Bayesian."""
    module = constructor(*arguments)
    module.__class__ = bayesian_class(plain, attributes)  # type: ignore[arg-type]
    return module


def _refuse_surgery(name: str, module: nn.Module, attribute: str) -> None:
    mean, rho = (module._parameters.get(key) for key in (attribute, attribute + RHO))
    if mean is None:
        found = "it is no longer a parameter of its module"
    elif rho is None:
        found = "its rho is no longer a parameter of its module"
    else:
        found = f"its shape is now {tuple(mean.shape)} but that of its rho is {tuple(rho.shape)}"
    raise DrawError(
        f"Cannot sample `{name}` ({type(module).__name__}): {found}. The module was changed after its conversion "
        "(pruning, weight norm, a parametrization, resizing?). "
        "Call bnnify.collapse first, change the model, and convert it again."
    )
