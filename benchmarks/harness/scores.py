"""What the logits of several networks say about images, by the functions behind `bnnify.evaluate`."""

from __future__ import annotations

import torch
from torch import Tensor

from bnnify.analysis.bootstrap import separated
from bnnify.analysis.metrics import METRICS_OF_CLASSES, columns_of, risks, scores_of
from bnnify.analysis.outcomes import Outcomes
from bnnify.prediction.averages import Averages, Prediction
from bnnify.prediction.known_likelihoods import as_likelihood

from .evaluation import fit_temperature

METRICS = ("accuracy", "NLL", "Brier score", "ECE", "AURC")
COVERAGES = (0.8, 0.9)
UNCERTAINTIES = ("entropy", "mutual information")


def log_probabilities(logits: Tensor) -> Tensor:
    """The logarithms of the networks' average, shape (N, classes), of logits of shape (K, N, classes)."""
    return logits.double().log_softmax(-1).logsumexp(0) - torch.tensor(len(logits)).log()


def nll(logits: Tensor, labels: Tensor) -> float:
    return _nll(logits, labels).item()


def temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature of the networks' average that these labels ask for."""
    return fit_temperature(log_probabilities(logits), labels)


def common_temperature(logits: Tensor, labels: Tensor) -> float:
    """That of each network for which these labels are likeliest under the networks' average."""
    return fit_temperature(logits, labels, _nll)


def scores(logits: Tensor, labels: Tensor, temperature: float) -> dict[str, float]:
    """The metrics of the average, its accuracy on the surest part of the images, and its NLL under a temperature."""
    columns, _ = columns_of(_outcomes(logits, labels))
    risk = risks(columns)
    tempered = (log_probabilities(logits) / temperature)[None]
    return (
        {name: METRICS_OF_CLASSES[name](columns) for name in METRICS}
        | {"tempered NLL": nll(tempered, labels)}
        | {f"accuracy at {level:.0%}": 1 - risk[round(level * len(labels)) - 1].item() for level in COVERAGES}
    )


def separations(inside: Tensor, outside: Tensor) -> dict[str, dict[str, float]]:
    """AUROC and FPR95 of the entropy and, of several networks, the mutual information, of logits of (K, N, classes)."""
    found = [scores_of(_outcomes(logits, torch.zeros(logits.shape[1]).long())) for logits in (inside, outside)]
    both = {name: (found[0][name], found[1][name]) for name in UNCERTAINTIES if name in found[0]}
    examples = (torch.arange(inside.shape[1]), torch.arange(outside.shape[1]))
    figures = separated(both, examples, times=0, seed=0)
    return {name: {metric: figure.value for metric, figure in each.items()} for name, each in figures.items()}


def prediction(logits: Tensor) -> Prediction:
    """The predictive distribution of the networks' average, of logits of shape (K, N, classes)."""
    averages = Averages(as_likelihood("logits"), logits.shape[1])
    for each in logits.float():
        averages.add(each)
    return averages.prediction()


def _nll(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.nll_loss(log_probabilities(logits), labels)


def _outcomes(logits: Tensor, labels: Tensor) -> Outcomes:
    log_prob = log_probabilities(logits).gather(1, labels[:, None]).squeeze(1)
    return Outcomes(prediction(logits), labels, log_prob, torch.arange(len(labels)))
