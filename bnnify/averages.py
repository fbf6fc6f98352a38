"""Averages over networks from the posterior, and the uncertainty that they show."""

__all__ = ["Averages", "Prediction", "concatenate"]

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .likelihood import entropy, one_tensor, pair_of, probabilities
from .posterior import at_least_float32


@dataclass(frozen=True)
class Prediction:
    """The predictive distribution of a batch, from ``num_samples`` networks.

    All shapes are those of the model's output; where there are classes, entropies drop the class dimension.

    Attributes:
        mean: The predictive mean: mean class probabilities for a classifier, the mean value otherwise.
        std: The standard deviation over networks of what was averaged (epistemic spread; zero for a single sample).
        num_samples: The number of networks.
        predictive_entropy: H[E p(y|x, w)] in nats: the total uncertainty of a classification. None for values.
        expected_entropy: E H[p(y|x, w)] in nats: the part that every network agrees on (aleatoric). None for values.
        aleatoric_std: √E[σ²(x)], the noise that the networks predict, for ``likelihood="gaussian"``. None otherwise.
    """

    mean: Tensor
    std: Tensor
    num_samples: int
    predictive_entropy: Tensor | None = None
    expected_entropy: Tensor | None = None
    aleatoric_std: Tensor | None = None

    @property
    def mutual_information(self) -> Tensor | None:
        """I(y; w|x) = predictive_entropy - expected_entropy in nats: what the networks disagree on (epistemic)."""
        if self.predictive_entropy is None or self.expected_entropy is None:
            return None
        return (self.predictive_entropy - self.expected_entropy).clamp(min=0)

    @property
    def epistemic_std(self) -> Tensor:
        """The spread of the networks' means; the same as ``std``."""
        return self.std

    @property
    def total_std(self) -> Tensor:
        """√(epistemic² + aleatoric²), by the law of total variance."""
        return self.std if self.aleatoric_std is None else (self.std**2 + self.aleatoric_std**2).sqrt()


class Averages:
    """What is kept of the outputs of the networks for one batch."""

    def __init__(self, likelihood: str, class_dim: int) -> None:
        self._likelihood = likelihood
        self._class_dim = class_dim
        self._values, self._entropies, self._variances = _Moments(), _Mean(), _Mean()

    def add(self, found: Any) -> None:
        likelihood, class_dim = self._likelihood, self._class_dim
        if likelihood == "gaussian":
            value, variance = pair_of(found)
            self._variances.add(variance)
        else:
            value = probabilities(one_tensor(found, likelihood), likelihood, class_dim)
        self._values.add(value)
        if likelihood in ("logits", "probabilities", "binary_logits"):
            self._entropies.add(entropy(value, likelihood, class_dim))

    def prediction(self) -> Prediction:
        mean, classifies = self._values.mean, self._entropies.count > 0
        return Prediction(
            mean=mean,
            std=self._values.std,
            num_samples=self._values.count,
            predictive_entropy=entropy(mean, self._likelihood, self._class_dim) if classifies else None,
            expected_entropy=self._entropies.mean if classifies else None,
            aleatoric_std=self._variances.mean.sqrt() if self._variances.count else None,
        )


class _Mean:
    """The mean of a stream of tensors, without keeping them."""

    mean: Any = 0.0  # until there is a first tensor

    def __init__(self) -> None:
        self.count = 0

    def add(self, value: Tensor) -> None:
        value = at_least_float32(value)
        self.count += 1
        self.mean = self.mean + (value - self.mean) / self.count


class _Moments(_Mean):
    """Mean and variance of a stream of tensors, without the cancellation of E[x²] - E[x]²."""

    _squares: Any = 0.0

    def add(self, value: Tensor) -> None:
        value = at_least_float32(value)
        difference = value - self.mean
        super().add(value)
        self._squares = self._squares + difference * (value - self.mean)

    @property
    def std(self) -> Tensor:
        return (self._squares / max(self.count - 1, 1)).clamp(min=0).sqrt()


def concatenate(predictions: list[Prediction]) -> Prediction:
    if not predictions:
        raise ValueError("predict was given a loader without batches.")

    def joined(name: str) -> Any:
        parts = [getattr(prediction, name) for prediction in predictions]
        return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts)

    names = ("mean", "std", "predictive_entropy", "expected_entropy", "aleatoric_std")
    return Prediction(num_samples=predictions[0].num_samples, **{name: joined(name) for name in names})
