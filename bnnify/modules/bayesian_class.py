"""The class of a Bayesian module: a subclass of its own class, in which reading a weight gives the draw's sample."""

__all__ = ["allow_replacement", "bayesian_class", "enter_class", "remove_companions"]

import copy
import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn
from torch.fx import GraphModule

from ..distributions.gaussian import dtype_of_rho
from ..draws.companions import INITIAL_STD, RHO
from ..draws.estimators import ESTIMATORS, check_input
from ..draws.sharding import is_distributed
from ..draws.slot import unsampled
from ..errors import DrawError
from ..torch_internals import FLAT_WEIGHTS
from .computed_weights import cache_properties, computed_weights
from .exported_programs import plain_view
from .known_forwards import known_forward
from .parameters import companions_of
from .read_properties import bayesian_property, computed_property, flat_weights_property, refuse_removal
from .settings import Slot, plain_class, slots_of
from .state_loading import freeze_prior_means, keep_ties, update_derived
from .subclassing import quiet_subclass


def enter_class(module: nn.Module, bayesian: dict[str, Slot]) -> None:
    """Give ``module`` the class in which these of its parameters, and what it computes from them, are Bayesian."""
    computed = computed_weights(module, bayesian)
    stored = (*computed, FLAT_WEIGHTS) if isinstance(module, nn.RNNBase) else computed
    for name in stored:
        module.__dict__.pop(name, None)  # where the layer or a hook has put it; reading gives it from now on
    estimated = "weight" in bayesian and ESTIMATORS[bayesian["weight"].settings.estimator] is not None
    made = bayesian_class(plain_class(module), tuple(bayesian), computed, estimated)
    object.__setattr__(module, "__class__", made)  # past the module's own __setattr__
    module.__dict__["_bayesian"] = bayesian


def remove_companions(module: nn.Module, attribute: str) -> None:
    """Remove the tensors beside the Bayesian parameter ``attribute``."""
    for ending in companions_of(slots_of(module)[attribute].settings):
        module._parameters.pop(attribute + ending, None)
        module._buffers.pop(attribute + ending, None)


_classes: weakref.WeakValueDictionary[tuple[Any, ...], type[nn.Module]] = weakref.WeakValueDictionary()
"""The classes in use. They are not kept alive: each graph has one of its own, with its code."""


def bayesian_class(
    plain: type[nn.Module], attributes: tuple[str, ...], computed: tuple[str, ...] = (), estimated: bool = False
) -> type[nn.Module]:
    """Make the subclass of ``plain`` in which ``attributes`` are Bayesian: reading one gives the sample of the draw.

    Reading one of ``computed`` computes it anew, from such samples. An ``estimated`` layer lets its estimator compute.
    The same arguments give the same class, for as long as it is in use.

    Example::

        >>> issubclass(bayesian_class(nn.Linear, ("weight", "bias")), nn.Linear)
        True
    """
    key = (plain, attributes, computed, estimated)
    made = _classes.get(key)
    if made is None:
        made = _classes[key] = _make_class(*key)
    return made


def _make_class(
    plain: type[nn.Module], attributes: tuple[str, ...], computed: tuple[str, ...], estimated: bool
) -> type[nn.Module]:
    namespace: dict[str, Any] = {attribute: bayesian_property(attribute) for attribute in attributes}
    namespace |= {weight: computed_property(plain, weight) for weight in computed} | cache_properties(attributes)
    if issubclass(plain, nn.RNNBase):
        namespace[FLAT_WEIGHTS] = flat_weights_property()
    if estimated:
        namespace["forward"] = _estimating_forward(plain)

    def extra_repr(self: nn.Module) -> str:
        described = [f"{name}: {slot.settings}" for name, slot in slots_of(self).items()]
        return "; ".join(filter(None, [plain.extra_repr(self), *described]))

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        reduced = plain.__reduce_ex__(self, protocol)
        if type(self) is not made:
            return reduced  # a subclass somebody wrote, which pickle finds by its name
        constructor, arguments, *state = cast(tuple[Any, ...], reduced)
        arguments = tuple(plain if argument is made else argument for argument in arguments)
        return _rebuild, ((plain, attributes, computed, estimated), constructor, arguments), *state

    def register_parameter(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        before = self._parameters.get(name)
        if name in slots_of(self) and before is not None and before is not parameter:
            if parameter is None:  # a bias that is done away with
                remove_companions(self, name)
            elif not is_distributed(parameter):  # as which tensor parallelism puts it here, in pieces
                _refuse_replacement(self, name)
        plain.register_parameter(self, name, parameter)

    def load_from_state_dict(
        self: nn.Module,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: dict[str, Any],
        strict: bool,
        missing: list[str],
        *args: Any,
    ) -> None:
        count, slots = len(missing), slots_of(self)
        own = [name + ending for name in slots for ending in ("", *companions_of(slots[name].settings))]
        with allow_replacement(self), keep_ties(self, own, missing):  # as load_state_dict(assign=True) does
            plain._load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, *args)
            freeze_prior_means(self)
        assigned = bool(metadata.get("assign_to_params_buffers"))
        missing[count:] = update_derived(self, state_dict, prefix, missing[count:], assigned)

    def apply(self: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
        scales = [self._buffers.get(name + INITIAL_STD) for name in slots_of(self)]
        rhos = [rho for name in slots_of(self) if (rho := self._parameters.get(name + RHO)) is not None]
        grads = [rho.grad for rho in rhos]

        def keep_width(tensor: Tensor) -> Tensor:
            # `half()` is for what is computed with: in half precision the scale of a small σ would be zero, and ρ
            # would lose the steps of its training.
            made: Tensor = function(tensor)
            if made.dtype != tensor.dtype and any(tensor is scale for scale in scales):
                return tensor.to(made.device)
            is_narrow = made.dtype != dtype_of_rho(made.dtype) and any(tensor is each for each in (*rhos, *grads))
            return tensor.to(made.device, dtype_of_rho(made.dtype)) if is_narrow else made

        plain._apply(self, keep_width, recurse)
        return self

    namespace |= {"_apply": apply}
    namespace |= {"register_parameter": register_parameter, "_load_from_state_dict": load_from_state_dict}
    namespace |= {"_plain_class": plain, "extra_repr": extra_repr, "__reduce_ex__": reduce_ex}
    namespace |= {"__module__": plain.__module__, "__doc__": plain.__doc__}
    if issubclass(plain, GraphModule):  # each has a class of its own, which torch knows how to make
        namespace |= {"__deepcopy__": _copy_graph, "__reduce_ex__": _reduce_graph}
    # `remove_parametrizations` deletes computed weights from the class.
    of_metaclass = {"__delattr__": _refuse_removal_from_class} if computed else {}
    made: type[nn.Module] = quiet_subclass(plain, f"Bayesian{plain.__name__}", namespace, of_metaclass)
    return made


def _estimating_forward(plain: Any) -> Any:
    known = known_forward(plain)
    if known is None:  # as when a pickle is read and the class has changed since
        raise DrawError(
            f"{plain.__name__} was converted with another estimator than the weight sample, and has a forward of its "
            "own now, in which only the weight sample works. Convert it with estimator='reparameterization'."
        )

    @functools.wraps(plain.forward)
    def forward(self: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        slots, parameters = slots_of(self), self._parameters
        estimator = unsampled(slots["weight"].active, parameters.get("weight"))
        if estimator is None:
            return plain.forward(self, input, *args, **kwargs)
        estimator.note_call(self)
        noisy_bias = unsampled(slots["bias"].active, parameters.get("bias")) if "bias" in slots else None
        bias = self.bias if noisy_bias is None else noisy_bias.mean

        def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return known.apply(self, input, weight, bias, *args, **kwargs)

        check_input(self, slots["weight"].settings.estimator, input)
        return estimator.forward(linear, known.channel, input, bias, noisy_bias)

    return forward


def _refuse_removal_from_class(cls: type, name: str) -> None:
    # Nothing that torch calls earlier tells a removal from a read.
    refuse_removal(cls, name, " torch has overwritten the parameter if it was a single one: load the weights again.")


def _copy_graph(module: GraphModule, memo: dict[int, Any]) -> GraphModule:
    view = plain_view(module, plain_class(module))
    made = view.__deepcopy__(memo)
    memo[id(module)] = made
    memo.setdefault(id(memo), []).append(view)  # which is in the memo by its id: nothing else may get that
    enter_class(made, copy.deepcopy(slots_of(module), memo))
    return made


def _reduce_graph(module: GraphModule, protocol: Any) -> Any:
    constructor, arguments = plain_view(module, plain_class(module)).__reduce__()
    return _rebuild_graph, (constructor, arguments, slots_of(module))


def _rebuild_graph(constructor: Any, arguments: tuple[Any, ...], bayesian: dict[str, Slot]) -> GraphModule:
    made: GraphModule = constructor(*arguments)
    enter_class(made, bayesian)
    return made


_may_be_replaced: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@contextmanager
def allow_replacement(module: nn.Module) -> Iterator[None]:
    """Allow, within this block, to replace a Bayesian parameter of ``module``, as assigning a file does."""
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


def _rebuild(key: tuple[Any, ...], constructor: Any, arguments: tuple[Any, ...]) -> Any:
    """Unpickle in any process: make an object of the plain class, then give it the Bayesian class of this key."""
    module = constructor(*arguments)
    object.__setattr__(module, "__class__", bayesian_class(*key))
    return module
