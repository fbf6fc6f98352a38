"""The checkpoint from which an interrupted fine-tuning goes on."""

__all__ = ["read_checkpoint", "write_checkpoint"]

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...checkpoints.atomic import replace_atomically
from ...errors import ArgumentError


def write_checkpoint(path: Path, state: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Write the state of a training with the settings it has; the file is there whole, or that of before."""
    with replace_atomically(path) as file:
        torch.save({"state": dict(state), "settings": dict(settings)}, file)


def read_checkpoint(path: Path, settings: Mapping[str, Any]) -> Any:
    """Read the state that :func:`write_checkpoint` wrote.

    Raises:
        ArgumentError: It is not there or damaged, or the training had other settings.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found = content["settings"]
    except FileNotFoundError:
        raise ArgumentError(f"There is no `{path}` to go on from. Leave --resume out.") from None
    except Exception as error:
        raise ArgumentError(f"`{path}` is damaged ({type(error).__name__}). Begin anew, with --force.") from error
    other = [name for name in settings if found.get(name) != settings[name]]
    if other:
        changes = ", ".join(f"{name} {found.get(name)!r} → {settings[name]!r}" for name in other)
        raise ArgumentError(f"`{path}` is of a training with other settings ({changes}). Use those, or --force.")
    return content["state"]
