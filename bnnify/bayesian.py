"""How a module becomes Bayesian: a subclass of its own class, in which reading a weight gives the draw's sample."""

__all__ = ["bayesian_class", "become_aware", "become_bayesian", "become_plain", "replacing_allowed"]

import copy
import functools
import types
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn
from torch.fx import GraphModule

from .computed import cache_properties, compute, computed_weights, parametrizations
from .draw import note_replacement, read, unsampled
from .errors import DrawError
from .estimators import ESTIMATORS, known_forward, may_note
from .exported import plain_view
from .parameters import PRIOR_MEAN, RHO, BayesianParameter, Settings, settings_of
from .posterior import has_pruned
from .ties import ties_kept


def become_bayesian(
    module: nn.Module,
    attribute: str,
    settings: Settings,
    rho: nn.Parameter | None,
    prior_mean: nn.Parameter | None,
) -> None:
    """Make one parameter of ``module`` Bayesian in place; the parameter stays where it is, as the posterior mean."""
    _enter_class(module, {**settings_of(module), attribute: settings})
    module.register_parameter(attribute + RHO, rho)
    if prior_mean is not None:
        module.register_parameter(attribute + PRIOR_MEAN, prior_mean)


def become_aware(module: nn.Module) -> None:
    """Let a module that computes its weights from the Bayesian parameters of its children do so at each read.

    That is what a parametrized layer does. Any other module is left as it is.
    """
    if computed_weights(module, settings_of(module)):
        _enter_class(module, settings_of(module))


def become_plain(module: nn.Module) -> None:
    """Undo :func:`become_bayesian` and :func:`become_aware` in place: the class and the parameters that it had."""
    computed = computed_weights(module, settings_of(module))
    for attribute, settings in settings_of(module).items():
        if settings.pruned:  # an optimizer's momentum may have moved the mean since
            parameter = BayesianParameter(attribute, module, attribute)
            parameter.mean.data.copy_(parameter.kept_mean)
        del module._parameters[attribute + RHO]
        module._parameters.pop(attribute + PRIOR_MEAN, None)
    del module.__dict__["_bayesian"]
    module.__class__ = _plain_class(type(module))
    for weight in computed:
        if weight not in parametrizations(module):
            module.__dict__[weight] = compute(module, weight).detach()
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()


def _enter_class(module: nn.Module, bayesian: dict[str, Settings]) -> None:
    computed = computed_weights(module, bayesian)
    stored = (*computed, "_flat_weights") if isinstance(module, nn.RNNBase) else computed
    for name in stored:
        module.__dict__.pop(name, None)  # where the layer or a hook has put it; reading gives it from now on
    module.__class__ = bayesian_class(_plain_class(type(module)), tuple(bayesian), computed, _estimated(bayesian))
    module.__dict__["_bayesian"] = bayesian


@functools.cache
def bayesian_class(
    plain: type[nn.Module], attributes: tuple[str, ...], computed: tuple[str, ...] = (), estimated: bool = False
) -> type[nn.Module]:
    """The subclass of ``plain`` in which ``attributes`` are Bayesian: reading one gives the sample of the draw.

    Reading one of ``computed`` computes it anew, from such samples. An ``estimated`` layer lets its estimator compute.

    Example::

        >>> issubclass(bayesian_class(nn.Linear, ("weight", "bias")), nn.Linear)
        True
    """
    namespace: dict[str, Any] = {attribute: _bayesian_property(attribute) for attribute in attributes}
    namespace |= {weight: _computed_property(plain, weight) for weight in computed} | cache_properties(attributes)
    if issubclass(plain, nn.RNNBase):
        namespace["_flat_weights"] = property(_flat_weights, lambda module, value: None)
    if estimated:
        namespace["forward"] = _estimating_forward(plain)

    def extra_repr(self: nn.Module) -> str:
        described = [f"{name}: {settings}" for name, settings in settings_of(self).items()]
        return "; ".join(filter(None, [plain.extra_repr(self), *described]))

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        reduced = plain.__reduce_ex__(self, protocol)
        if type(self) is not made:
            return reduced  # a subclass somebody wrote, which pickle finds by its name
        constructor, arguments, *state = cast(tuple[Any, ...], reduced)
        arguments = tuple(plain if argument is made else argument for argument in arguments)
        return _rebuild, (plain, attributes, constructor, arguments, computed, estimated), *state

    def register_parameter(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        before = self._parameters.get(name)
        # A distributed tensor is the same parameter in pieces, as tensor parallelism puts it here.
        same = before is parameter or hasattr(parameter, "full_tensor")
        if name in settings_of(self) and None not in (before, parameter) and not same:
            _refuse_replacement(self, name)
        plain.register_parameter(self, name, parameter)

    def load_from_state_dict(self: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        derived = [name + ending for name in settings_of(self) for ending in ("", RHO, PRIOR_MEAN)]
        with replacing_allowed(self), ties_kept(self, derived, args[-1]):  # as load_state_dict(assign=True) does
            plain._load_from_state_dict(self, state_dict, prefix, *args)
        for name, settings in settings_of(self).items():
            parameter = BayesianParameter(prefix + name, self, name)
            if f"{prefix}{name}{PRIOR_MEAN}" in state_dict:
                parameter.refresh_initial_std()
            if f"{prefix}{name}{RHO}" in state_dict:
                settings.pruned = has_pruned(parameter.rho)

    namespace |= {"register_parameter": register_parameter, "_load_from_state_dict": load_from_state_dict}
    namespace |= {"_plain_class": plain, "extra_repr": extra_repr, "__reduce_ex__": reduce_ex}
    namespace |= {"__module__": plain.__module__, "__doc__": plain.__doc__}
    if issubclass(plain, GraphModule):  # each has a class of its own, which torch knows how to make
        namespace |= {"__deepcopy__": _copy_graph, "__reduce_ex__": _reduce_graph}
    # Through the metaclass, which need not be `type`: a module may also be an abstract base class.
    keywords = {"metaclass": _guarding(cast(type, type(plain)))} if computed else {}
    made: type[nn.Module] = types.new_class(
        f"Bayesian{plain.__name__}", (plain,), keywords, exec_body=lambda ns: ns.update(namespace)
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


def _estimated(bayesian: dict[str, Settings]) -> bool:
    """Whether the layer's forward is left to an estimator, as that of its weight says."""
    return "weight" in bayesian and ESTIMATORS[bayesian["weight"].estimator] is not None


def _estimating_forward(plain: Any) -> Any:
    known = known_forward(plain)
    assert known is not None  # the conversion has looked

    @functools.wraps(plain.forward)
    def forward(self: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        settings, parameters = settings_of(self), self._parameters
        estimator = unsampled(settings["weight"].active, parameters.get("weight"))
        if estimator is None:
            return plain.forward(self, input, *args, **kwargs)
        if not estimator.first_call():
            for each in settings.values() if may_note() else ():
                each.called_again = estimator.draw or 0
            return plain.forward(self, input, *args, **kwargs)
        noisy_bias = unsampled(settings["bias"].active, parameters.get("bias")) if "bias" in settings else None
        bias = self.bias if noisy_bias is None else noisy_bias.mean

        def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return known.apply(self, input, weight, bias, *args, **kwargs)

        return estimator.forward(linear, known.channel, input, bias, noisy_bias)

    return forward


def _computed_property(plain: type[nn.Module], weight: str) -> property:
    parametrized = getattr(plain, weight, None)  # if so, torch has made a property too, which knows how to assign
    set_ = parametrized.fset if isinstance(parametrized, property) else _discard

    def delete(module: nn.Module) -> None:
        _refuse_removal(type(module), weight)

    return property(lambda module: compute(module, weight), set_, delete)


def _discard(module: nn.Module, value: Tensor) -> None:
    """What a hook assigns before each forward: it has computed it as reading does."""


@functools.cache
def _guarding(metaclass: type) -> type:
    """The metaclass of classes with computed weights; ``remove_parametrizations`` deletes these from the class."""

    def delete(cls: type, name: str) -> None:
        # Nothing that torch calls earlier tells a removal from a read.
        _refuse_removal(
            cls, name, " torch has overwritten the parameter if it was a single one: load the weights again."
        )

    return type(f"Guarding{metaclass.__name__}", (metaclass,), {"__delattr__": delete})


def _refuse_removal(cls: type, weight: str, moreover: str = "") -> None:
    raise DrawError(
        f"Cannot remove what computes `{weight}` of {cls.__name__}: it computes it from parameters with a posterior. "
        f"Call bnnify.collapse first, change the model, and convert it again.{moreover}"
    )


def _copy_graph(module: GraphModule, memo: dict[int, Any]) -> GraphModule:
    made = plain_view(module, _plain_class(type(module))).__deepcopy__(memo)
    memo[id(module)] = made
    _enter_class(made, copy.deepcopy(settings_of(module), memo))
    return made


def _reduce_graph(module: GraphModule, protocol: Any) -> Any:
    constructor, arguments = plain_view(module, _plain_class(type(module))).__reduce__()
    return _rebuild_graph, (constructor, arguments, settings_of(module))


def _rebuild_graph(constructor: Any, arguments: tuple[Any, ...], bayesian: dict[str, Settings]) -> GraphModule:
    made: GraphModule = constructor(*arguments)
    _enter_class(made, bayesian)
    return made


_may_be_replaced: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@contextmanager
def replacing_allowed(module: nn.Module) -> Iterator[None]:
    """Within this block a Bayesian parameter of ``module`` may be replaced by another, as assigning a file does."""
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


def _plain_class(cls: type) -> Any:
    return getattr(cls, "_plain_class", cls)


def _rebuild(
    plain: type[nn.Module],
    attributes: tuple[str, ...],
    constructor: Any,
    arguments: tuple[Any, ...],
    computed: tuple[str, ...] = (),
    estimated: bool = False,
) -> Any:
    """Unpickle in any process: make an object of the plain class, then let it become Bayesian."""
    module = constructor(*arguments)
    module.__class__ = bayesian_class(plain, attributes, computed, estimated)  # type: ignore[arg-type]
    return module
