"""How a module becomes Bayesian: a subclass of its own class, in which reading a weight gives the draw's sample."""

__all__ = ["bayesian_class", "become_bayesian", "become_plain"]

import functools
import types
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from .draw import note_replacement, read
from .errors import DrawError
from .parameters import PRIOR_MEAN, RHO, BayesianParameter, Settings, settings_of


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

    def register_parameter(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        before = self._parameters.get(name)
        # A distributed tensor is the same parameter in pieces, as tensor parallelism puts it here.
        same = before is parameter or hasattr(parameter, "full_tensor")
        if name in settings_of(self) and None not in (before, parameter) and not same:
            _refuse_replacement(self, name)
        plain.register_parameter(self, name, parameter)

    def load_from_state_dict(self: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        with _replacing_allowed(self):  # as load_state_dict(assign=True) does
            plain._load_from_state_dict(self, state_dict, prefix, *args)
        for name in settings_of(self):
            if f"{prefix}{name}{PRIOR_MEAN}" in state_dict:
                BayesianParameter(prefix + name, self, name).refresh_initial_std()

    namespace |= {"register_parameter": register_parameter, "_load_from_state_dict": load_from_state_dict}
    namespace |= {"_plain_class": plain, "extra_repr": extra_repr, "__reduce_ex__": reduce_ex}
    namespace |= {"__module__": plain.__module__, "__doc__": plain.__doc__}
    # Through the metaclass, which need not be `type`: a module may also be an abstract base class.
    made: type[nn.Module] = types.new_class(
        f"Bayesian{plain.__name__}", (plain,), exec_body=lambda ns: ns.update(namespace)
    )
    return made


def _bayesian_property(attribute: str) -> property:
    def get(module: nn.Module) -> Tensor | None:
        if attribute in module._parameters:
            value = module._parameters[attribute]
            return None if value is None else read(settings_of(module)[attribute].active, value)
        if attribute not in module.__dict__:
            raise AttributeError(attribute)
        return note_replacement(settings_of(module)[attribute].active, module.__dict__[attribute])

    def set_(module: nn.Module, value: Any) -> None:
        # Parameters never come here: nn.Module registers them. A plain tensor does when a hypernetwork, pruning or
        # weight_norm has removed the parameter; the next draw decides whether that can be lived with.
        module.__dict__[attribute] = value

    return property(get, set_)


_may_be_replaced: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@contextmanager
def _replacing_allowed(module: nn.Module) -> Iterator[None]:
    _may_be_replaced.add(module)
    try:
        yield
    finally:
        _may_be_replaced.discard(module)


def _refuse_replacement(module: nn.Module, name: str) -> None:
    if module not in _may_be_replaced:
        raise DrawError(
            f"Cannot replace `{name}` of {type(module).__name__} by another parameter: it is the mean of a posterior, "
            "and its rho would not follow. Call bnnify.collapse first, change the model, and convert it again; "
            "to change values alone, load them with bnnify.load_weights."
        )


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
