"""Bootstrap intervals: examples are drawn again with replacement, and every figure is computed anew from the same."""

__all__ = ["Figure", "compared", "separated"]

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .metrics import Columns, Metric, separation

_ENDS = torch.tensor([0.025, 0.975], dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class Figure:
    """A figure with its bootstrap interval.

    Attributes:
        value: Of the data as they are.
        low: The 2.5 % quantile over resamples; None without any.
        high: The 97.5 % quantile over resamples; None without any.
    """

    value: float
    low: float | None = None
    high: float | None = None


def compared(
    rows: Mapping[str, tuple[Columns, Tensor]], metrics: Mapping[str, Metric], times: int, seed: int
) -> tuple[dict[str, dict[str, Figure]], dict[str, dict[str, Figure]]]:
    """Compute the metrics of each row, and the differences of all others from the first one, on the same resamples.

    Args:
        rows: Columns, and the number of the example that each datum belongs to.
        metrics: What is computed.
        times: The number of resamples.
        seed: Of the resamples.
    """

    def measured(columns: Columns) -> dict[str, float]:
        return {name: metric(columns) for name, metric in metrics.items()}

    values = {row: measured(columns) for row, (columns, _) in rows.items()}
    number = max(int(examples.max()) for _, examples in rows.values()) + 1
    resampled: dict[str, list[dict[str, float]]] = {row: [] for row in rows}
    for counts in _draws(number, times, seed):
        for row, (columns, examples) in rows.items():
            index = _drawn(examples, counts)
            resampled[row].append(measured({name: column[index] for name, column in columns.items()}))
    first, *others = rows
    return (
        {row: _figures(values[row], resampled[row]) for row in rows},
        {
            row: _figures(_minus(values[row], values[first]), list(map(_minus, resampled[row], resampled[first])))
            for row in others
        },
    )


def separated(
    scores: Mapping[str, tuple[Tensor, Tensor]], examples: tuple[Tensor, Tensor], times: int, seed: int
) -> dict[str, dict[str, Figure]]:
    """Compute how well each score, of data from inside and outside, tells them apart; both are drawn again.

    Args:
        scores: For each the values inside and outside, larger for what is foreign.
        examples: The number of the example that each datum belongs to, inside and outside.
        times: The number of resamples.
        seed: Of the resamples.
    """
    sizes = [int(each.max()) + 1 for each in examples]
    found = {}
    for name, both in scores.items():
        ranks = torch.cat(both).unique(return_inverse=True)[1].split([len(each) for each in both])
        draws = zip(*(_draws(size, times, seed + n) for n, size in enumerate(sizes)), strict=True)
        once = [torch.ones(size, device="cpu") for size in sizes]
        values, *resampled = [_separated(ranks, examples, counts) for counts in [once, *draws]]
        found[name] = _figures(values, resampled)
    return found


def _separated(ranks: Sequence[Tensor], examples: Sequence[Tensor], counts: Sequence[Tensor]) -> dict[str, float]:
    """How well ranks tell apart two sides, of which each example counts so often."""
    number = max(int(rank.max()) for rank in ranks) + 1
    weights = [count[each].double() for count, each in zip(counts, examples, strict=True)]
    return separation(*(rank.bincount(weight, number) for rank, weight in zip(ranks, weights, strict=True)))


def _draws(number: int, times: int, seed: int) -> Iterator[Tensor]:
    """Yield how often each of a ``number`` of examples is drawn; the pixels of one image go together."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(times):
        yield torch.randint(number, (number,), generator=generator, device="cpu").bincount(minlength=number)


def _drawn(examples: Tensor, counts: Tensor) -> Tensor:
    """The places of the data that were drawn, in their order."""
    return torch.arange(len(examples), device="cpu").repeat_interleave(counts[examples])


def _minus(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {name: value - other[name] for name, value in one.items()}


def _figures(values: Mapping[str, float], resampled: Sequence[Mapping[str, float]]) -> dict[str, Figure]:
    found = {}
    for name, value in values.items():
        column = torch.tensor([each[name] for each in resampled], dtype=torch.float64, device="cpu")
        low, high = column.quantile(_ENDS).tolist() if resampled else (None, None)
        found[name] = Figure(value, low, high)
    return found
