"""What a forward is given of a batch, and which part of its output counts."""

__all__ = ["as_arguments", "check_num_samples", "choose", "first_of"]

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def check_num_samples(num_samples: int) -> None:
    """Raise a ValueError unless ``num_samples`` is a positive integer."""
    if not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"num_samples must be a positive integer, not {num_samples!r}.")


def choose(found: Any, output: str | int | Callable[[Any], Any] | None) -> Any:
    if output is None:
        return found
    if callable(output):
        return output(found)
    if isinstance(output, str) and not isinstance(found, Mapping):
        return getattr(found, output)
    return found[output]


def as_arguments(batch: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    if isinstance(batch, Mapping):
        return (), batch
    return (batch, {}) if isinstance(batch, tuple) else ((batch,), {})


def first_of(batch: Any, device: torch.device) -> Any:
    """The input among what a loader yields, on the model's device."""
    if isinstance(batch, (list, tuple)):
        batch = batch[0]
    if isinstance(batch, Mapping):
        return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    return batch.to(device) if isinstance(batch, Tensor) else batch
