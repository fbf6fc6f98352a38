"""Turn decisions into the plain data that stand in a file, and back."""

__all__ = ["decisions_as_data", "decisions_from_data"]

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..decisions import DECISIONS, Decision
from ..errors import CheckpointError, describe

_TYPES: dict[str, Any] = {"float": (int, float), "str": str, "bool": bool}


def decisions_as_data(decisions: Mapping[str, Decision]) -> dict[str, Any]:
    """Return decisions, by name, as they stand in a file.

    Raises:
        CheckpointError: One is not of bnnify's own.
    """
    for name, decision in decisions.items():
        if not isinstance(name, str) or type(decision) not in DECISIONS.values():
            raise CheckpointError(
                f"Cannot save bnn.decisions[{name!r}]: {describe(decision)} is none of {', '.join(DECISIONS)} under a "
                "name, and a file could not restore it. Take it out."
            )
    return {
        name: {"kind": type(decision).__name__, **dataclasses.asdict(decision)} for name, decision in decisions.items()
    }


def decisions_from_data(data: Mapping[str, Any]) -> dict[str, Decision]:
    """Return the decisions of which :func:`decisions_as_data` made the data.

    Raises:
        CheckpointError, AttributeError, KeyError, TypeError, ValueError: The data are damaged.
    """
    return {str(name): _decision(**each) for name, each in data.items()}


def _decision(kind: str, **values: Any) -> Decision:
    found = DECISIONS[kind](**values)
    for field in dataclasses.fields(found):
        if not isinstance(values[field.name], _TYPES[str(getattr(field.type, "__name__", field.type))]):
            raise CheckpointError(f"{kind} has {values[field.name]!r} as {field.name}")
    return found
