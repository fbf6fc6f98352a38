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
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from .draw import Active, read
from .errors import DrawError
from .posterior import PosteriorStd, fan_in_scale, rho_from_std
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
        return self.module._bayesian[self.attribute]  # type: ignore[index, union-attr, return-value]

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

    def kl(self) -> Tensor:
        """KL(q‖p) of this parameter in nats, summed over its elements."""
        settings = self.settings
        return settings.prior.kl(Posterior(self.mean, self.rho, self.prior_mean, settings.initial_std))


def bayesian_parameters(root: nn.Module) -> Iterator[BayesianParameter]:
    """Every Bayesian parameter under ``root``, a tied one once for each module that holds it.

    Raises:
        DrawError: A module was changed after its conversion in a way that took the parameter out of its hands.
    """
    for module_name, module in root.named_modules():
        if not is_bayesian(module):
            continue
        for attribute in module._bayesian:  # type: ignore[union-attr]
            mean = module._parameters.get(attribute)
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
    return "_bayesian" in module.__dict__


def is_derived(module: nn.Module, attribute: str) -> bool:
    """Whether this parameter of ``module`` is the ρ or the prior mean of another one."""
    return any(attribute in (name + RHO, name + PRIOR_MEAN) for name in module.__dict__.get("_bayesian", ()))


def become_bayesian(
    module: nn.Module,
    attribute: str,
    settings: Settings,
    rho: nn.Parameter,
    prior_mean: nn.Parameter | None,
) -> None:
    """Make one parameter of ``module`` Bayesian in place; the parameter stays where it is, as the posterior mean."""
    settings_of = dict(module.__dict__.get("_bayesian", {}), **{attribute: settings})
    plain = _plain_class(type(module))
    module.__class__ = bayesian_class(plain, tuple(settings_of))
    module._bayesian = settings_of  # type: ignore[assignment]
    module.register_parameter(attribute + RHO, rho)
    if prior_mean is not None:
        module.register_parameter(attribute + PRIOR_MEAN, prior_mean)
    if isinstance(module, nn.RNNBase):
        module.__dict__.pop("_flat_weights", None)


def become_plain(module: nn.Module) -> None:
    """Undo :func:`become_bayesian` in place: the class it had, and the posterior means as its parameters."""
    for attribute in module._bayesian:  # type: ignore[union-attr]
        del module._parameters[attribute + RHO]
        module._parameters.pop(attribute + PRIOR_MEAN, None)
    del module._bayesian
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
        described = [
            f"{name}: {settings}"
            for name, settings in self._bayesian.items()  # type: ignore[union-attr, operator]
        ]
        return "; ".join(filter(None, [plain.extra_repr(self), *described]))

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        reduced = plain.__reduce_ex__(self, protocol)
        if type(self) is not made:
            return reduced  # a subclass somebody wrote, which pickle finds by its name
        constructor, arguments, *state = reduced
        arguments = tuple(plain if argument is made else argument for argument in arguments)
        return _rebuild, (plain, attributes, constructor, arguments), *state

    namespace |= {"_plain_class": plain, "extra_repr": extra_repr, "__reduce_ex__": reduce_ex}
    namespace |= {"__module__": plain.__module__, "__doc__": plain.__doc__}
    made = type(plain)(f"Bayesian{plain.__name__}", (plain,), namespace)
    return made


def initial_std(mean: Tensor, module: nn.Module, rule: PosteriorStd) -> Tensor:
    """The σ with which ``rule`` starts the posterior of ``mean``, a parameter of ``module``: a scalar or one per element."""
    layer_weight = mean if mean.ndim > 1 else module._parameters.get("weight")
    return rule(mean.detach(), fan_in_scale(mean if layer_weight is None else layer_weight))


def initial_rho(mean: Tensor, std: Tensor) -> Tensor:
    """The ρ of ``mean``'s shape, dtype and device that gives the posterior this σ."""
    return rho_from_std(std.to(mean.dtype)).expand_as(mean).contiguous()


def _bayesian_property(attribute: str) -> property:
    def get(module: nn.Module) -> Tensor | None:
        if attribute in module._parameters:
            return read(module._bayesian[attribute].active, module._parameters[attribute])  # type: ignore[index, union-attr, arg-type, return-value]
        try:
            return cast(Tensor, module.__dict__[attribute])
        except KeyError:
            raise AttributeError(attribute) from None

    def set_(module: nn.Module, value: Any) -> None:
        # Parameters never come here: nn.Module registers them. A plain tensor does when a hypernetwork, pruning or
        # weight_norm has removed the parameter; the next draw decides whether that can be lived with.
        module.__dict__[attribute] = value

    return property(get, set_)


def _flat_weights(module: nn.RNNBase) -> list[Tensor | None]:
    """The list from which recurrent layers read their weights, read anew so that it holds the draw's samples."""
    return [getattr(module, name, None) for name in module._flat_weights_names]


def _plain_class(cls: type) -> type:
    return getattr(cls, "_plain_class", cls)


def _rebuild(plain: type[nn.Module], attributes: tuple[str, ...], constructor: Any, arguments: tuple[Any, ...]) -> Any:
    """Unpickle in any process: make an object of the plain class, then let it become Bayesian."""
    module = constructor(*arguments)
    module.__class__ = bayesian_class(plain, attributes)
    return module


def _refuse_surgery(name: str, module: nn.Module, attribute: str) -> None:
    found = (
        f"its shape is now {tuple(mean.shape)} but that of its rho is {tuple(rho.shape)}"
        if (mean := module._parameters.get(attribute)) is not None
        and (rho := module._parameters.get(attribute + RHO)) is not None
        else "it is no longer a parameter of its module"
    )
    raise DrawError(
        f"Cannot sample `{name}` ({type(module).__name__}): {found}. The module was changed after its conversion "
        "(pruning, weight norm, a parametrization, resizing?). Call bnnify.collapse first, change the model, and convert it again."
    )
