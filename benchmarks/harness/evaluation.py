"""How good a classifier's predictive probabilities are: accuracy, likelihood, calibration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

from .report import spread

BINS = 15


@dataclass(frozen=True)
class Metrics:
    """The quality of a set of predictions."""

    accuracy: float
    nll: float
    """Mean negative log likelihood of the labels, in nats."""
    ece: float
    """Expected calibration error over 15 bins of equal width."""
    ece_interval: tuple[float, float]
    """Its 95 % bootstrap interval."""
    entropy: float
    """Mean entropy of the predictive distribution, in nats."""


@dataclass(frozen=True)
class Result:
    """What one network scores on one set of images."""

    images: str
    network: str
    metrics: Metrics
    seed: int = 0
    """Of its training."""
    others: dict[str, float] = field(default_factory=dict)
    """Figures that not every network has."""


def grouped(results: list[Result]) -> dict[tuple[str, str], list[Result]]:
    """The runs from several seeds, by images and network: the networks of the first images come first."""
    images = list(dict.fromkeys(result.images for result in results))
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in sorted(results, key=lambda result: images.index(result.images)):
        groups.setdefault((result.images, result.network), []).append(result)
    return groups


def score_cells(runs: list[Result], interval: bool = True) -> list[str]:
    """Accuracy in percent, NLL, and ECE with its interval; means and standard deviations over the runs."""
    metrics = [run.metrics for run in runs]
    low, high = (fmean(ends) for ends in zip(*(one.ece_interval for one in metrics), strict=True))
    return [
        spread([100 * one.accuracy for one in metrics], places=2),
        spread([one.nll for one in metrics]),
        spread([one.ece for one in metrics]) + (f" [{low:.3f}, {high:.3f}]" if interval else ""),
    ]


@torch.no_grad()
def logits(network: nn.Module, inputs: Tensor, batch_size: int = 500) -> Tensor:
    """The output of a deterministic network in eval mode."""
    network.eval()
    return torch.cat([network(batch) for batch in inputs.split(batch_size)])


def evaluate(probabilities: Tensor, labels: Tensor, resamples: int = 200) -> Metrics:
    """Measures predictive probabilities, shape (N, classes), against labels, shape (N,)."""
    probabilities = probabilities.double()
    log_probabilities = probabilities.clamp_min(torch.finfo(torch.float64).tiny).log()
    return Metrics(
        accuracy=(probabilities.argmax(1) == labels).double().mean().item(),
        nll=F.nll_loss(log_probabilities, labels).item(),
        ece=calibration_error(probabilities, labels),
        ece_interval=_bootstrap_interval(probabilities, labels, resamples),
        entropy=torch.special.entr(probabilities).sum(1).mean().item(),
    )


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """The expected calibration error: mean distance between confidence and accuracy within bins of confidence."""
    return multiclass_calibration_error(probabilities, labels, probabilities.shape[1], BINS, norm="l1").item()


def fit_temperature(logits: Tensor, labels: Tensor, nll: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy) -> float:
    """The temperature that minimises the negative log likelihood of softmax(logits / temperature)."""
    logits = logits.double()
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nll(logits / log_temperature.exp(), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return log_temperature.exp().item()


def cross_fitted_temperature(logits: Tensor, labels: Tensor) -> Tensor:
    """Probabilities of each half of the data under the temperature fitted on the other half."""
    probabilities = torch.empty_like(logits)
    # Every other item: the halves are balanced even where the data are sorted by class.
    for start in (0, 1):
        rest = slice(1 - start, None, 2)
        temperature = fit_temperature(logits[rest], labels[rest])
        probabilities[start::2] = (logits[start::2] / temperature).softmax(1)
    return probabilities


def _bootstrap_interval(probabilities: Tensor, labels: Tensor, resamples: int) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(labels), (resamples, len(labels)), generator=generator)
    errors = torch.tensor([calibration_error(probabilities[draw], labels[draw]) for draw in draws])
    # Resampling adds calibration error of its own: only the spread of the draws is used, around the measured error.
    spread = errors.quantile(torch.tensor([0.025, 0.975])) - errors.mean()
    low, high = (calibration_error(probabilities, labels) + spread).clamp_min(0).tolist()
    return low, high
