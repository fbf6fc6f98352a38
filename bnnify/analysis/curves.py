"""The curves of a report, as plain lists of numbers."""

__all__ = ["curves_of"]

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .metrics import Columns, coverage, reliability, risks

_POINTS = 200
"""The most points of a curve."""

_LEVELS = [level / 20 for level in range(1, 20)]

_BINS = 40

_SHOWN = ("entropy", "mutual information", "std over networks")


def curves_of(
    rows: Mapping[str, Columns], scores: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]], of_classes: bool
) -> dict[str, Any]:
    """Make what :meth:`Report.plot` draws: by the name of the curve, and then by row.

    ``"reliability"`` holds confidence, accuracy and share of each bin; ``"risk_coverage"`` shares of the data and the
    risks at them; ``"coverage"`` levels of intervals and how many data are in them; ``"histograms"`` by score and side
    edges and densities.
    """
    curves: dict[str, Any] = {}
    for row, columns in rows.items():
        if of_classes:
            bins = [[None if each.isnan() else each.item() for each in part] for part in reliability(columns)]
            curves.setdefault("reliability", {})[row] = bins
            risk = risks(columns)
            places = torch.linspace(0, len(risk) - 1, min(len(risk), _POINTS), device=risk.device).long()
            curves.setdefault("risk_coverage", {})[row] = [((places + 1) / len(risk)).tolist(), risk[places].tolist()]
        else:
            curves.setdefault("coverage", {})[row] = [_LEVELS, [coverage(columns, level) for level in _LEVELS]]
    for found in scores.values():
        for name in _SHOWN:
            if name in found:  # in the end those of the networks
                curves.setdefault("histograms", {})[name] = _histograms(*found[name])
    return curves


def _histograms(inside: Tensor, outside: Tensor) -> dict[str, Any]:
    both = torch.cat([inside, outside]).double()
    low, high = both.min().item(), both.max().item() + 1e-12
    edges = torch.linspace(low, high, _BINS + 1, dtype=both.dtype, device=both.device)
    sides = {"in distribution": inside, "out of distribution": outside}
    return {
        side: [edges.tolist(), torch.histogram(values.double(), edges, density=True).hist.tolist()]
        for side, values in sides.items()
    }
