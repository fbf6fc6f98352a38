"""Subclasses that are made without a notice to the class, its metaclass or its registry of subclasses."""

__all__ = ["quiet_subclass"]

from abc import ABCMeta
from collections.abc import Mapping
from typing import Any


class _SilentBase:
    """A base that stands before the others of a class, so that Python calls its hook and none of theirs."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


def _mro_with_silent_base(cls: type) -> list[type]:
    own, *others = type.mro(cls)
    return [own, _SilentBase, *others]


def quiet_subclass(
    plain: type, name: str, namespace: Mapping[str, Any], metaclass_namespace: Mapping[str, Any] | None = None
) -> type:
    """Make a subclass of ``plain`` without a call of its ``__init_subclass__`` or of its metaclass.

    A class may keep a registry of its subclasses, or refuse to have any; what it would do with a class that a user
    wrote, it need not do with one that only adds properties.

    Args:
        plain: The class; its metaclass may be any.
        name: The name of the subclass.
        namespace: The attributes of the subclass.
        metaclass_namespace: The attributes that its metaclass adds to that of ``plain``. Default: ``None``, none.

    Example::

        >>> quiet_subclass(dict, "Table", {"unit": "nats"}).unit
        'nats'
    """
    metaclass: type = type(plain)
    added = dict(metaclass_namespace or {})
    if hasattr(plain.__init_subclass__, "__func__"):  # one that is written in Python
        # As a base it would change the layout, which a module cannot do that becomes an instance.
        added["mro"] = _mro_with_silent_base
    if added:
        metaclass = type.__new__(type(metaclass), f"{name}Type", (metaclass,), added)
    # Where the code of a metaclass of somebody's own would run, that of its base does the same without side effects.
    maker: Any = ABCMeta if issubclass(metaclass, ABCMeta) else type
    made: type = maker.__new__(metaclass, name, (plain,), dict(namespace))
    return made
