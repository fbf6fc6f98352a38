"""The properties of a Bayesian class through which its weights are read."""

__all__ = ["bayesian_property", "computed_property", "flat_weights_property", "refuse_removal"]

from typing import Any

from torch import Tensor, nn

from ..draws.slot import note_replacement, read
from ..errors import DrawError
from ..torch_internals import flat_weight_names
from .computed_weights import compute
from .parameters import refuse_fsdp1
from .settings import slots_of


def bayesian_property(attribute: str) -> property:
    """Let reading ``attribute`` give the sample of the draw in effect, and the posterior mean outside of one."""

    def get(module: nn.Module) -> Tensor | None:
        if attribute in module._parameters:
            value = module._parameters[attribute]
            return None if value is None else read(slots_of(module)[attribute].active, value)
        if attribute not in module.__dict__:
            raise AttributeError(attribute)
        return note_replacement(slots_of(module)[attribute].active, module.__dict__[attribute])

    def set_(module: nn.Module, value: Any) -> None:
        # Parameters never come here: nn.Module registers them. A plain tensor does when a hypernetwork, pruning or
        # weight_norm has removed the parameter; the next draw decides whether that can be lived with.
        module.__dict__[attribute] = value

    def delete(module: nn.Module) -> None:
        refuse_fsdp1(module, attribute)
        if attribute not in module.__dict__:
            raise AttributeError(attribute)
        del module.__dict__[attribute]

    return property(get, set_, delete)


def computed_property(plain: type[nn.Module], weight: str) -> property:
    """Let reading ``weight`` compute it from the parameters of a module of class ``plain``, as they read now."""
    parametrized = getattr(plain, weight, None)  # if so, torch has made a property too, which knows how to assign
    set_ = parametrized.fset if isinstance(parametrized, property) else _discard

    def delete(module: nn.Module) -> None:
        refuse_removal(type(module), weight)

    return property(lambda module: compute(module, weight), set_, delete)


def _discard(module: nn.Module, value: Any) -> None:
    """Drop what torch or a hook assigns: they have computed it as reading does."""


def refuse_removal(cls: type, weight: str, moreover: str = "") -> None:
    """Raise a DrawError for an attempt to take away what computes ``weight`` of a class; ``moreover`` ends it."""
    raise DrawError(
        f"Cannot remove what computes `{weight}` of {cls.__name__}: it computes it from parameters with a posterior. "
        f"Call bnnify.collapse first, change the model, and convert it again.{moreover}"
    )


def flat_weights_property() -> property:
    """Give a recurrent layer the list that it reads its weights from, made anew so that it holds the draw's samples."""

    def get(module: Any) -> list[Tensor | None]:
        return [getattr(module, name, None) for name in flat_weight_names(module)]

    return property(get, _discard)
