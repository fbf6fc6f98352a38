"""Streaming averages over networks, and the prediction that they give."""

__all__ = ["AVERAGES", "Averages", "Prediction", "concatenate"]

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, check_share
from .likelihood import Likelihood, has_values
from .running_means import Mean, Moments, Pieces

AVERAGES = ("mean", "std", "predictive_entropy", "expected_entropy", "aleatoric_std")
"""The tensors of a prediction."""


@dataclass(frozen=True)
class Prediction:
    """The predictive distribution of a batch, from ``num_samples`` networks.

    All shapes are those of the model's output; where there are classes, entropies drop the class dimension.

    Attributes:
        mean: The predictive mean: mean class probabilities for a classifier, the mean value otherwise.
        std: The standard deviation over networks of what was averaged (epistemic spread; zero for a single sample).
        num_samples: The number of networks.
        predictive_entropy: H[E p(y|x, w)] in nats: the total uncertainty of a classification. None for a regression.
        expected_entropy: E H[p(y|x, w)] in nats: the part that every network agrees on (aleatoric). None likewise.
        aleatoric_std: √E[σ²(x)], the noise of the data, where the likelihood tells it: ``"gaussian"``, a function, or
            the NLL module of a regression. None otherwise.
        class_dim: The dimension of the classes in ``mean``, counted from the end. None where there are none.
    """

    mean: Tensor
    std: Tensor
    num_samples: int
    predictive_entropy: Tensor | None = None
    expected_entropy: Tensor | None = None
    aleatoric_std: Tensor | None = None
    class_dim: int | None = None

    @property
    def mutual_information(self) -> Tensor | None:
        """I(y; w|x) = predictive_entropy - expected_entropy in nats, the disagreement of the networks (epistemic)."""
        if self.predictive_entropy is None or self.expected_entropy is None:
            return None
        return (self.predictive_entropy - self.expected_entropy).clamp(min=0)

    @property
    def epistemic_std(self) -> Tensor:
        """The spread of the networks' means; the same as ``std``."""
        return self.std

    @property
    def total_std(self) -> Tensor | None:
        """√(epistemic² + aleatoric²), by the law of total variance; None where the noise of the data is not known."""
        return None if self.aleatoric_std is None else (self.std**2 + self.aleatoric_std**2).sqrt()

    def interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """mean ± z · total_std: the central interval in which a new observation lies with probability ``level``.

        It is that of the Gaussian with the mean and the variance of the prediction. The networks' own distributions
        together are close to it where their noise is Gaussian and larger than their disagreement.

        Args:
            level: Between 0 and 1. Default: ``0.9``.

        Returns:
            The lower and the upper end, of the shape of ``mean``.

        Raises:
            ArgumentError: The noise of the data is not known, or ``level`` is not between 0 and 1.

        Example::

            >>> low, high = bnn.predict(x, likelihood=bnnify.GaussianNLL(std=0.1)).interval(0.95)
        """
        check_share("interval(level)", level)
        if self.total_std is None:
            raise ArgumentError(
                "interval() needs the noise of the data, which likelihood='values' does not tell: the spread of the "
                "networks alone covers far too little. Pass predict the NLL module of the training, likelihood=nll, or "
                "'gaussian' for a pair (mean, variance). Of classes there are sets instead: bnnify.ConformalSets."
            )
        half = NormalDist().inv_cdf((1 + level) / 2) * self.total_std
        return self.mean - half, self.mean + half


class Averages:
    """Running averages over the outputs of networks for one batch, of ``rows`` examples if their number is known.

    They take the memory of two outputs, one for the mean and one for the standard deviation.
    """

    def __init__(self, likelihood: Likelihood, rows: int | None = None) -> None:
        self._likelihood = likelihood
        self._rows = rows
        self._shape: torch.Size | None = None

    def add(self, found: Any) -> None:
        """Add the output of one network.

        Raises:
            ArgumentTypeError: It is not of the kind that the likelihood needs.
            ArgumentError: It cannot mean what the likelihood says, or differs in shape from that of another network.
        """
        parts = self._likelihood.parts(found)
        if self._shape is None:
            self._likelihood.check(parts, self._rows)  # of one network, because to look at values takes time
            self._shape = parts[0].shape
            self._pieces = pieces = Pieces(parts[0], self._likelihood)
            self._values, self._entropies, self._variances = Moments(pieces), Mean(pieces), Mean(pieces)
        elif parts[0].shape != self._shape:
            raise ArgumentError(
                f"Outputs of two networks for one batch have the shapes {tuple(self._shape)} and "
                f"{tuple(parts[0].shape)}, and no average. Choose with output= what has one shape, such as all scores "
                "before they are filtered, or look at networks one by one: with bnn.draw(): bnn.module(x)."
            )
        for number, piece in enumerate(zip(*map(self._pieces.of, parts), strict=True)):
            mean = self._likelihood.mean(piece)
            self._values.add(number, mean)
            self._variances.add(number, self._likelihood.variance(piece))
            self._entropies.add(number, self._likelihood.entropy(mean))

    def prediction(self) -> Prediction:
        """Make the prediction from the outputs so far, in the memory of the averages.

        Raises:
            ArgumentError: The average cannot mean what the likelihood says.
        """
        mean, variance = self._values.mean, self._variances.mean
        self._likelihood.check_average(mean)
        return Prediction(
            mean=mean,
            std=self._values.std(),
            num_samples=self._values.count,
            predictive_entropy=self._likelihood.entropy(mean),
            expected_entropy=self._entropies.mean,
            aleatoric_std=None if variance is None else variance.sqrt(),
            class_dim=self._class_dim(mean),
        )

    def _class_dim(self, mean: Tensor) -> int | None:
        if not self._likelihood.has_classes:
            return None
        dim = self._likelihood.class_dim
        return -1 if dim is None else dim % mean.ndim - mean.ndim


def concatenate(predictions: list[Prediction], rows: Sequence[int | None]) -> Prediction:
    """Concatenate the predictions of batches, with so many ``rows`` as far as that is known, along the first dimension.

    They are taken out of the list.

    Raises:
        ArgumentError: There is none; their shapes do not fit or their first dimension does not count examples; or one
            is not finite.
    """
    if not predictions:
        raise ArgumentError("predict was given a loader without batches.")
    if len(predictions) > 1:
        _check_shapes([prediction.mean.shape for prediction in predictions], rows)

    def joined(parts: list[Any]) -> Any:
        return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts)

    parts = {name: [getattr(prediction, name) for prediction in predictions] for name in AVERAGES}
    num_samples, class_dim = predictions[0].num_samples, predictions[0].class_dim
    predictions.clear()  # so that one of these at a time is in memory twice
    averages = {name: joined(parts.pop(name)) for name in AVERAGES}
    prediction = Prediction(num_samples=num_samples, class_dim=class_dim, **averages)
    _check_finite(prediction)
    return prediction


def _check_shapes(shapes: list[torch.Size], rows: Sequence[int | None]) -> None:
    if not all(shapes):
        raise ArgumentError(
            "The model returned one number for each batch, and those of several batches are not concatenated. Let it "
            "return one for each example (reduction='none'), or predict batch by batch."
        )
    first = {len(shape) for shape in shapes}
    counting = [dim for dim in range(min(first)) if all(shape[dim] == n for shape, n in zip(shapes, rows, strict=True))]
    if len(counting) == 1 and counting[0] > 0:
        raise ArgumentError(
            f"Results of several batches are concatenated along the first dimension, and the outputs, of shape "
            f"{tuple(shapes[0])}, seem to count the examples along dimension {counting[0]}. Put it in front: "
            f"output=lambda out: out.movedim({counting[0]}, 0); if the first one does count them, predict batch by "
            "batch."
        )
    if len({shape[1:] for shape in shapes}) > 1:
        others = next(shape for shape in shapes if shape[1:] != shapes[0][1:])
        raise ArgumentError(
            f"Results of several batches are concatenated along the first dimension, and outputs have the shapes "
            f"{tuple(shapes[0])} and {tuple(others)}. Pad inputs to one size, or predict batch by batch; if examples "
            "are counted along another dimension, put it in front, as in output=lambda out: out.movedim(1, 0)."
        )


def _check_finite(prediction: Prediction) -> None:
    for name in ("mean", "expected_entropy", "aleatoric_std"):
        value = getattr(prediction, name)
        # The sum, which takes no memory, is finite only if all are.
        if value is None or not has_values(value) or value.sum().isfinite() or value.isfinite().all():
            continue
        if value.is_nested:
            where = ""
        else:
            places = (~value.isfinite()).nonzero()
            where = f" in {len(places)} of {value.numel()} places, first at {tuple(places[0].tolist())}"
        raise ArgumentError(
            f"The average over networks ({name}) is NaN or infinite{where}. Look for NaN in the inputs, for overflow "
            "(predict in float32; a smaller σ), or, under likelihood='gaussian', for a variance that is not positive. "
            "If the model marks something with infinity, replace it: output=lambda out: out.nan_to_num()."
        )
