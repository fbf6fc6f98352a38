"""The selection of the parameters that become Bayesian, and of the settings given for them."""

__all__ = ["UNSET", "Select", "Selection", "Setting", "WhyNot", "known_names", "resolve"]

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import ConversionError
from ..report import Reason
from .computed_weights import unsupported
from .holders import Holder
from .parameters import is_derived
from .patterns import Patterns
from .refusals import is_quantized
from .registry import layer_of

Select: TypeAlias = str | Sequence[str] | Callable[[str, nn.Module], bool] | None

_T = TypeVar("_T")
Setting: TypeAlias = _T | Mapping[str, _T]


class _Unset:
    """The value of an option that was not given, as opposed to one that was given its default."""

    def __repr__(self) -> str:
        return "default"


UNSET: Any = _Unset()


class WhyNot(NamedTuple):
    """The reason why a parameter is left alone, and the sentence that gives it."""

    reason: Reason
    sentence: str

    @property
    def is_general(self) -> bool:
        """True if neither ``select`` nor ``exclude`` is the reason."""
        return self.reason not in (Reason.NOT_SELECTED, Reason.EXCLUDED)


class Selection:
    """The parameters that ``select`` and ``exclude`` choose, and the reasons why the others are left alone.

    Args:
        select: As in :func:`bnnify.convert`.
        holders: The parameters of the model, each with every place that holds it.
        exclude: As in :func:`bnnify.convert`.

    Raises:
        ConversionError: ``select`` is of an unknown kind, or a glob in it or in ``exclude`` matches nothing.
    """

    def __init__(
        self, select: Select, holders: Mapping[Tensor, Sequence[Holder]], exclude: str | Sequence[str] = ()
    ) -> None:
        self._holders = holders
        self._excluded = _as_patterns("exclude", exclude)
        self._by_default = select is None
        self._choose = select if callable(select) else None
        globs = () if select is None or callable(select) else select
        self._selected = _as_patterns("select", globs, _SELECTS)
        if isinstance(select, (list, tuple)) and not select:
            raise ConversionError(f"Unknown select {select!r}: give {_SELECTS}.")
        for option, patterns in (("select", self._selected), ("exclude", self._excluded)):
            if (unmatched := _first_unmatched(patterns, holders)) is not None:
                raise ConversionError(f"{option}={unmatched!r} matches nothing; {known_names(holders)}.")

    def why_not(self) -> dict[Tensor, WhyNot | None]:
        """Find the reason why each parameter is left alone; None for one that is to become Bayesian."""
        found: dict[Tensor, WhyNot | None] = {}
        for parameter, places in self._holders.items():
            reasons = [self._why_not(place, parameter) for place in places]
            found[parameter] = None if None in reasons else reasons[0]
            if _matching(self._excluded, places):
                found[parameter] = _because(Reason.EXCLUDED)
        return found

    def _why_not(self, place: Holder, parameter: Tensor) -> WhyNot | None:
        if not is_lazy(parameter) and parameter.numel() == 0:
            return _because(Reason.EMPTY)
        if why := unsupported(place.module):
            return _because(Reason.UNSUPPORTED, why=why)
        by_module = _by_module(self._selected, place)
        if _by_name(self._selected, place) - by_module:
            return None
        if self._choose is not None:
            selected = any(self._choose(name, place.layer) for name in place.layer_names)
        else:
            selected = self._by_default or bool(by_module)
        if (self._by_default or not selected) and _is_in_quantized_layer(place):
            return _because(Reason.QUANTIZED)
        if not selected:
            return _because(Reason.NOT_SELECTED)
        return self._why_no_weight(place, parameter)

    def _why_no_weight(self, place: Holder, parameter: Tensor) -> WhyNot | None:
        """Find the reason why a parameter in a selected layer is left alone; None if it is a weight."""
        layer = layer_of(place.layer)
        names = layer.names_in(place.layer) if layer else ()
        if layer is None and place.is_operator_weight is None:
            is_unknown, is_weight = place.may_be_layer or not _is_scale(parameter), False
        elif layer is None:
            is_unknown, is_weight = False, bool(place.is_operator_weight)
        else:
            is_unknown = layer.may_miss(place.layer, place.weight) and not _is_scale(parameter)
            is_weight = place.weight in names and (layer.by_default or not self._by_default)
        if not (is_unknown or is_weight):
            return _because(Reason.OFF_BY_DEFAULT if self._by_default else Reason.NOT_A_WEIGHT)
        if not parameter.requires_grad and not is_quantized(parameter):
            return _because(Reason.FROZEN)
        return _unknown(place, names) if is_unknown else None


_SELECTS = "a glob, a list of globs, or a function (name, module) -> bool"


def resolve(option: str, given: Setting[_T], chosen: Mapping[Tensor, Sequence[Holder]]) -> dict[Tensor, _T]:
    """Find the value of an option for each chosen parameter: the same for all, or that of its first matching glob.

    Raises:
        ConversionError: One of the globs matches no chosen parameter.
    """
    if given is UNSET:
        return {}
    if not isinstance(given, Mapping):
        return dict.fromkeys(chosen, given)
    patterns, values = _as_patterns(option, tuple(given)), list(given.values())
    if (unmatched := _first_unmatched(patterns, chosen)) is not None:
        raise ConversionError(f"The pattern {unmatched!r} in {option}= matches none of the parameters to convert.")
    matching = {parameter: _matching(patterns, places) for parameter, places in chosen.items()}
    return {parameter: values[min(positions)] for parameter, positions in matching.items() if positions}


def known_names(holders: Mapping[Tensor, Sequence[Holder]]) -> str:
    """List the first names of the parameters, for a message."""
    known = ", ".join(f"`{places[0].names[0]}`" for places in list(holders.values())[:5])
    return f"the model's parameters are {known}{', …' if len(holders) > 5 else ''}"


def _as_patterns(option: str, given: object, wanted: str = "a glob, or a list of globs") -> Patterns:
    globs = (given,) if isinstance(given, str) else given
    if isinstance(globs, Sequence) and all(isinstance(glob, str) for glob in globs):
        return Patterns(globs)
    raise ConversionError(f"Unknown {option} {given!r}: give {wanted}.")


def _because(reason: Reason, **details: str) -> WhyNot:
    return WhyNot(reason, reason.value.format(**details))


def _is_in_quantized_layer(place: Holder) -> bool:
    layer = layer_of(place.layer)
    weights = [place.layer._parameters.get(name) for name in (layer.names_in(place.layer) if layer else ())]
    return any(is_quantized(weight) for weight in weights if weight is not None)


def _is_scale(parameter: Tensor) -> bool:
    """Tell whether it is a vector or a number, such as a scale or a temperature, and not a matrix of weights."""
    return is_lazy(parameter) or sum(size > 1 for size in parameter.shape) < 2


def _unknown(place: Holder, known: Sequence[str]) -> WhyNot:
    module = place.layer
    others = (name for name in module._parameters if name not in known and not is_derived(module, name))
    names = [*known, *itertools.islice(others, _FEW)]
    if place.weight not in names[:_FEW]:
        names = [*names[: _FEW - 1], place.weight]
    listed = ", ".join(f'"{name}"' for name in names[:_FEW])
    return _because(Reason.UNKNOWN_LAYER, layer=type(module).__name__, names=listed)


_FEW = 4
"""The number of names of parameters that a sentence lists."""


def _first_unmatched(patterns: Patterns, holders: Mapping[Tensor, Sequence[Holder]]) -> str | None:
    """Find the first of the globs that matches no parameter; None if all do."""
    matched = {position for places in holders.values() for position in _matching(patterns, places)}
    return next((glob for position, glob in enumerate(patterns.globs) if position not in matched), None)


def _matching(patterns: Patterns, places: Sequence[Holder]) -> set[int]:
    """Find the positions of the globs that match a parameter, or a module that contains it."""
    return {position for place in places for position in _by_name(patterns, place) | _by_module(patterns, place)}


def _by_name(patterns: Patterns, place: Holder) -> set[int]:
    return {position for name in place.names for position in patterns.matching(name)}


def _by_module(patterns: Patterns, place: Holder) -> set[int]:
    """Find the positions of the globs that match the module, or one that contains it."""
    parts = (part for name in place.module_names for part in itertools.accumulate(name.split("."), "{}.{}".format))
    return {position for part in parts for position in patterns.matching(part)}
