"""Subclasses that nobody wakes up for: neither the class nor its metaclass learns that it has been derived from."""

__all__ = ["quiet_subclass"]

from abc import ABCMeta
from collections.abc import Mapping
from typing import Any


class _Unheard:
    """The first base of a quiet subclass, whose hook Python calls in place of that of the class itself."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


def quiet_subclass(
    plain: type, name: str, namespace: Mapping[str, Any], metaclass_namespace: Mapping[str, Any] | None = None
) -> type:
    """A subclass of ``plain`` of which neither its ``__init_subclass__`` nor its metaclass is told.

    A class may keep a registry of its subclasses, or refuse to have any; what it would do with a class that a user
    wrote, it need not do with one that only adds properties.

    Args:
        plain: The class; its metaclass may be any.
        name: The name of the subclass.
        namespace: What stands in it.
        metaclass_namespace: What its metaclass has beyond that of ``plain``. Default: ``None``, nothing.

    Example::

        >>> quiet_subclass(nn.Linear, "Same", {}).__mro__[-3:-1] == nn.Linear.__mro__[-2:-1] + ()
        False
    """
    metaclass: type = type(plain)
    # Where the code of a metaclass of somebody's own would run, that of its base does the same without side effects.
    maker: Any = ABCMeta if issubclass(metaclass, ABCMeta) else type
    if metaclass_namespace:
        metaclass = type.__new__(type(metaclass), f"{name}Type", (metaclass,), dict(metaclass_namespace))
    return maker.__new__(metaclass, name, (_Unheard, plain), dict(namespace))
