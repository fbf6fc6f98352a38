"""Metrics of predictions, as functions of columns that hold a number for each datum; some need torchmetrics."""

__all__ = [
    "METRICS_OF_CLASSES",
    "METRICS_OF_NUMBERS",
    "Columns",
    "Metric",
    "columns_of",
    "coverage",
    "reliability",
    "risks",
    "scores_of",
    "separation",
]

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..decisions.classes import class_probabilities
from .outcomes import Outcomes

Columns: TypeAlias = Mapping[str, Tensor]
"""Vectors of one length; of a classification in the order of falling confidence, which resampling keeps."""

Metric: TypeAlias = Callable[[Columns], float]

LEVEL = 0.9
"""The level of the intervals whose coverage and width are told."""

_BINS = 15


def columns_of(outcomes: Outcomes) -> tuple[Columns, Tensor]:
    """What the metrics are computed from, and to which example each datum belongs."""
    prediction = outcomes.prediction
    if prediction.predictive_entropy is None:
        return _columns_of_numbers(outcomes), outcomes.examples
    probabilities = class_probabilities("evaluate", prediction)
    confidence, answers = probabilities.max(-1)
    labels = outcomes.targets.long()
    of_label = probabilities.gather(-1, labels[:, None]).squeeze(-1)
    # Σ (p - y)²; of a yes/no answer (p - y)², once.
    brier = probabilities.square().sum(-1) - 2 * of_label + 1
    brier = brier / 2 if prediction.class_dim is None else brier
    columns = {
        "confidence": confidence,
        "correct": (answers == labels).double(),
        "log_prob": outcomes.log_prob,
        "brier": brier,
    }
    order = confidence.argsort(descending=True, stable=True)
    return {name: column[order] for name, column in columns.items()}, outcomes.examples[order]


def _columns_of_numbers(outcomes: Outcomes) -> Columns:
    error = outcomes.targets.double() - outcomes.prediction.mean.double()
    total: Any = outcomes.prediction.total_std  # known, as what tells log p(y|x) tells the noise
    std = total.double()
    z = error / std
    normal = torch.distributions.Normal(torch.zeros_like(z), torch.ones_like(z), validate_args=False)
    crps = std * (z * (2 * normal.cdf(z) - 1) + 2 * normal.log_prob(z).exp() - 1 / math.sqrt(math.pi))
    return {"square": error.square(), "log_prob": outcomes.log_prob, "crps": crps, "z": z.abs(), "std": std}


def _ece(columns: Columns) -> float:
    from torchmetrics.functional.classification import binary_calibration_error

    confidence, correct = columns["confidence"], columns["correct"].long()
    return binary_calibration_error(confidence, correct, n_bins=_BINS, validate_args=False).item()


def _adaptive_ece(columns: Columns) -> float:
    gaps = columns["confidence"] - columns["correct"]
    return sum(each.sum().abs().item() for each in gaps.tensor_split(_BINS)) / len(gaps)


def risks(columns: Columns) -> Tensor:
    """The share of errors among the surest datum, the two surest, and so on."""
    errors = 1 - columns["correct"]
    return errors.cumsum(0) / torch.arange(1, len(errors) + 1, device=errors.device)


def reliability(columns: Columns) -> tuple[Tensor, Tensor, Tensor]:
    """The mean confidence and the accuracy in each of 15 bins of one width, and the share of data in it."""
    bins = (columns["confidence"] * _BINS).long().clamp(max=_BINS - 1)
    counts = bins.bincount(minlength=_BINS)
    found = [bins.bincount(columns[name], minlength=_BINS) / counts for name in ("confidence", "correct")]
    return found[0], found[1], counts / counts.sum()


def _half_width(level: float) -> float:
    return torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64, device="cpu")).item()


def coverage(columns: Columns, level: float) -> float:
    """The share of data in their central interval of this ``level``."""
    return (columns["z"] <= _half_width(level)).double().mean().item()


METRICS_OF_CLASSES: Mapping[str, Metric] = {
    "accuracy": lambda columns: columns["correct"].mean().item(),
    "NLL": lambda columns: -columns["log_prob"].mean().item(),
    "Brier score": lambda columns: columns["brier"].mean().item(),
    "ECE": _ece,
    "adaptive ECE": _adaptive_ece,
    "AURC": lambda columns: risks(columns).mean().item(),
}
"""Of a classification: NLL in nats per datum; the Brier score Σ (p - y)² over the classes; ECE over 15 bins of one
width, adaptive ECE over 15 bins of one number of data; AURC, the mean over k of the share of errors among the k surest.
"""

METRICS_OF_NUMBERS: Mapping[str, Metric] = {
    "RMSE": lambda columns: columns["square"].mean().sqrt().item(),
    "NLL": lambda columns: -columns["log_prob"].mean().item(),
    "CRPS": lambda columns: columns["crps"].mean().item(),
    "90 % coverage": lambda columns: coverage(columns, LEVEL),
    "90 % width": lambda columns: 2 * _half_width(LEVEL) * columns["std"].mean().item(),
}
"""Of a regression: NLL of the networks' own distributions, averaged; CRPS, coverage and width of the Gaussian with the
mean and the variance of the prediction.
"""


def scores_of(outcomes: Outcomes) -> dict[str, Tensor]:
    """What may tell foreign data: the larger, the more foreign."""
    prediction = outcomes.prediction
    if prediction.predictive_entropy is None:
        found = {"total std": prediction.total_std, "std over networks": prediction.std}
    else:
        confidence = class_probabilities("evaluate", prediction).amax(-1)
        found = {
            "entropy": prediction.predictive_entropy,
            "mutual information": prediction.mutual_information,
            "max probability": -confidence,
            "energy": outcomes.energy,
        }
    if prediction.num_samples == 1:  # one network does not disagree with itself
        found |= {"std over networks": None, "mutual information": None}
    return {name: score for name, score in found.items() if score is not None}


def separation(inside: Tensor, outside: Tensor) -> dict[str, float]:
    """How well a score, larger for what is foreign, tells apart data from inside and outside.

    ``"AUROC"`` is the probability that the score is larger for one from outside, and half of that of a tie; ``"FPR95"``
    the share of those from outside that pass where 95 % of those from inside do.

    Args:
        inside: How many data from inside have each value of the score, in rising order of the values.
        outside: How many from outside.
    """
    inside, outside = inside / inside.sum(), outside / outside.sum()
    passing = inside.cumsum(0)
    auroc = (outside * (passing - inside / 2)).sum().item()
    last = (passing >= 0.95 - 1e-12).int().argmax()
    return {"AUROC": auroc, "FPR95": outside[: last + 1].sum().item()}
