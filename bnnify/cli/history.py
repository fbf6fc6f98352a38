"""What commands did with a model: they write it into the file, and what one was told holds for the next."""

__all__ = ["entry", "recalled", "told"]

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from ..version import __version__

History = Sequence[Mapping[str, Any]]


def entry(command: str, settings: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, Any]:
    """Make the entry of a command: what it was told, without what was not said, and what came of it."""
    return {
        "what": command,
        "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "bnnify": __version__,
        "settings": {name: value for name, value in settings.items() if value is not None},
        "figures": dict(figures),
    }


def recalled(history: History, setting: str) -> Any:
    """Return what the last command was told that was told about ``setting``; None if none was."""
    found = (each.get("settings", {}).get(setting) for each in reversed(history))
    return next((value for value in found if value is not None), None)


def told(history: History) -> str:
    """Tell the history, a line for each command."""
    return "\n".join(
        " ".join(
            filter(
                None,
                [
                    str(each.get("when", ""))[:16].replace("T", " "),
                    str(each.get("what", "")),
                    ", ".join(f"{name} {_short(value)}" for name, value in each.get("figures", {}).items()),
                ],
            )
        )
        for each in history
    )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
