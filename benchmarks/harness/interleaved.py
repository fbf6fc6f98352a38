"""Times variants of one computation in turn, A B C A B C …, so that what disturbs the machine disturbs all of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping
from statistics import median, quantiles

import torch

from .progress import track

Rounds = dict[str, list[float]]
"""Of each variant the milliseconds it took in each round."""


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    device: str = "cpu",
    *,
    warmup: int = 3,
    at_least: float = 10.0,
    description: str = "measuring",
) -> Rounds:
    """The wall time of a call of each variant in each of ``rounds`` rounds.

    A call that takes less than ``at_least`` milliseconds is repeated within its round, and the mean taken: what ran
    before it has emptied the caches, and a short call alone would measure little else.
    """
    calls = dict.fromkeys(variants, 1)
    measured: Rounds = {name: [] for name in variants}
    for number in track(range(warmup + rounds), description):
        for name, milliseconds in _round(variants, calls, device).items():
            if number >= warmup:
                measured[name].append(milliseconds)
            else:
                calls[name] = max(1, round(at_least / max(milliseconds, 1e-3)))
    return measured


def _round(variants: Mapping[str, Callable[[], object]], calls: Mapping[str, int], device: str) -> dict[str, float]:
    gc.collect()
    gc.disable()
    try:
        return {name: milliseconds(variant, calls[name], device) for name, variant in variants.items()}
    finally:
        gc.enable()


def milliseconds(call: Callable[[], object], number: int = 1, device: str = "cpu") -> float:
    """The mean wall time of ``number`` calls, until the device has done what they asked of it."""
    _synchronize(device)
    started = time.perf_counter()
    for _ in range(number):
        call()
    _synchronize(device)
    return 1000 * (time.perf_counter() - started) / number


def drop_failing(calls: dict[str, Callable[[], object]], names: Iterable[str]) -> list[str]:
    """Calls each of these once, takes out those that raise, and says which and why."""
    notes = []
    for name in names:
        try:
            calls[name]()
        except Exception as error:  # of any kind: a compiler has many
            del calls[name]
            notes.append(f"{name}: {type(error).__name__}: {str(error).strip().splitlines()[0][:100]}")
    return notes


def ratios(measured: Rounds, name: str, reference: str) -> tuple[float, float, float]:
    """The first quartile, the median and the third of a variant's time over that of the reference in the same round."""
    found = [one / other for one, other in zip(measured[name], measured[reference], strict=True)]
    return tuple(quantiles(found, n=4, method="inclusive")) if len(found) > 1 else (found[0],) * 3


def summary(measured: Rounds, references: list[str]) -> dict[str, dict[str, object]]:
    """Of each variant every time, their median, and quartiles of its ratio to each reference."""
    return {
        name: {
            "median ms": median(times),
            "ratio": {reference: ratios(measured, name, reference) for reference in references},
            "ms": times,
        }
        for name, times in measured.items()
    }


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
