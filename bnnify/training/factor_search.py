"""Searches over the logarithm of a factor: for a minimum, for the largest that passes, and in steps of two."""

__all__ = ["largest_passing", "minimum", "walk"]

import math
from collections.abc import Callable

from ..errors import ArgumentError

_PRECISION = 0.1
"""The error of the logarithm that ends a search."""

_LOG2 = math.log(2)

_POWERS, _BEYOND = (-6, -4, -2, 0), (2, 4)
"""Sizes of σ relative to μ, as powers of two, at which a minimum is looked for, and more if the largest is the best."""

_SMALLEST, _START, _LARGEST = -10 * _LOG2, -6 * _LOG2, 0.0
"""The smallest size that may pass, the first one that is tried, and the largest, as logarithms.

The output of an untrained network hardly depends on its weights, so that σ of many times their size would pass.
"""

_NOTICEABLE = 1e-4
"""The least gain, in nats per datum, that is worth a step."""


def minimum(function: Callable[[float], float], size: float) -> float:
    """Find where a function is smallest: in steps of four, beyond their end if need be, and then in halved steps.

    Args:
        function: The loss at the logarithm of a factor. It is looked at 14 times at most, as a rule 12 times.
        size: What the candidates are relative to: log(rms(σ) / rms(μ)) under the factor 1.

    Raises:
        ArgumentError: It is finite nowhere.
    """
    points = [power * _LOG2 - size for power in _POWERS]
    values = {x: function(x) for x in points}
    for power in _BEYOND:
        if min(values, key=values.__getitem__) == points[-1]:
            points.append(power * _LOG2 - size)
            values[points[-1]] = function(points[-1])
    step = 2 * _LOG2
    while True:
        best = min(values, key=values.__getitem__)
        if not math.isfinite(values[best]):
            raise ArgumentError("tune_std: under no factor on σ is the likelihood of the held-out data finite.")
        if step <= _PRECISION:
            return best
        step /= 2
        values |= {x: function(x) for x in (best - step, best + step)}


def largest_passing(passes: Callable[[float], bool], size: float) -> float:
    """Find the largest that passes, or else the smallest of all: up or down in steps of two, then by bisection.

    It goes up to where σ is as large as μ.

    Args:
        passes: Whether the logarithm of a factor passes.
        size: As in :func:`minimum`.
    """
    low, high = _START, math.inf
    while not passes(low - size):
        high, low = low, low - _LOG2
        if low < _SMALLEST - _PRECISION:
            return high - size
    while math.isinf(high) and low < _LARGEST - _PRECISION:
        if passes(low + _LOG2 - size):
            low += _LOG2
        else:
            high = low + _LOG2
    while math.isfinite(high) and high - low > _PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if passes(middle - size) else (low, middle)
    return low - size


def walk(function: Callable[[float], float], start: float, value: float) -> tuple[float, float]:
    """Walk from ``start``, where the function has this ``value``, in steps of two for as long as that helps."""
    for step in _LOG2, -_LOG2:
        x = start
        while (there := function(x + step)) < value - _NOTICEABLE:
            x, value = x + step, there
        if x != start:
            return x, value
    return start, value
