"""Intervals that hold a new observation with a given probability."""

__all__ = ["ConformalIntervals"]

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, ArgumentTypeError, check_share, check_tensor, describe
from ..prediction.averages import Prediction
from .conformity import finite_sample_quantile


@dataclass(frozen=True)
class ConformalIntervals:
    """``mean ± factor · total_std``, with the factor that makes it hold ``coverage`` of held-out observations.

    Where the noise of the data is not known (``likelihood="values"``), it is ``mean ± factor``.

    If new data are exchangeable with the held-out ones, which the network must not have been trained on, then on
    average over both the observation is in the interval with probability ``coverage`` or more, however wrong
    ``total_std`` is. That is no promise for each input by itself, nor for data that have changed.

    Attributes:
        factor: The quantile of the held-out ``|y - mean| / total_std``.
        coverage: The probability that was asked for.
        scaled: Whether the width goes with ``total_std``.

    References:
        Lei et al. 2018, "Distribution-Free Predictive Inference for Regression", section 5.2.

    Example::

        >>> intervals = bnnify.ConformalIntervals.fit(bnn.predict(x, likelihood=nll, seed=0), y, coverage=0.9)
        >>> low, high = intervals(bnn.predict(x_new, likelihood=nll, seed=0))
    """

    factor: float
    coverage: float
    scaled: bool

    @classmethod
    def fit(cls, prediction: Prediction, targets: Tensor, coverage: float = 0.9) -> "ConformalIntervals":
        """Find the factor on held-out data, with MAPIE, from the extra ``cli``.

        Args:
            prediction: For held-out data, of a regression with one number for each example.
            targets: What was observed, of the shape of ``prediction.mean``, (N,) or (N, 1). N must be at least
                ``coverage / (1 - coverage)``.
            coverage: Between 0 and 1. Default: ``0.9``.

        Raises:
            ArgumentError: There are too few data, the targets do not fit or are not finite, a ``total_std`` is not
                positive, or the prediction is of classes or of several numbers for each example.
            ArgumentTypeError: An argument is of a wrong type.
            MissingLibraryError: MAPIE is not installed.
        """
        caller = "ConformalIntervals.fit"
        check_share(f"{caller}(coverage)", coverage)
        mean, scale = _mean_and_scale(caller, prediction)
        check_tensor(f"{caller}: the targets", targets, "Pass torch.as_tensor(targets).")
        if targets.shape != mean.shape:
            raise ArgumentError(
                f"{caller} got targets of shape {tuple(targets.shape)} for a mean of shape {tuple(mean.shape)}. Make "
                "them alike, with targets.reshape or with output= of predict."
            )
        scores = (targets.detach().to(mean.device) - mean).abs() / scale
        if not scores.isfinite().all():
            raise ArgumentError(f"{caller}: targets or predictions are not finite in places.")
        factor = finite_sample_quantile(caller, scores.flatten(), coverage)
        return cls(factor, coverage, prediction.total_std is not None)

    def __call__(self, prediction: Prediction) -> tuple[Tensor, Tensor]:
        """The lower and the upper end, of the shape of ``prediction.mean``.

        Raises:
            ArgumentError: The prediction is of classes, of several numbers for each example, or does not know the noise
                as that did on which this was fitted.
            ArgumentTypeError: It is no prediction.
        """
        mean, scale = _mean_and_scale("ConformalIntervals", prediction)
        if self.scaled != (prediction.total_std is not None):
            known, unknown = ("with", "without") if self.scaled else ("without", "with")
            raise ArgumentError(
                f"ConformalIntervals was fitted on a prediction {known} known noise, and this one is {unknown}. Give "
                "predict the same likelihood in both places."
            )
        half = self.factor * scale
        return (mean - half).to(prediction.mean.dtype), (mean + half).to(prediction.mean.dtype)


def _mean_and_scale(caller: str, prediction: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(prediction, Prediction):
        raise ArgumentTypeError(f"{caller} takes a Prediction, as bnn.predict gives it, not {describe(prediction)}.")
    shape = tuple(prediction.mean.shape)
    if prediction.predictive_entropy is not None or prediction.mean.is_complex():
        raise ArgumentError(f"{caller} is for predictions of real numbers. Of classes take ConformalSets.")
    if len(shape) not in (1, 2) or shape[1:] not in ((), (1,)):
        raise ArgumentError(
            f"{caller} is for one number for each example, a mean of shape (N,) or (N, 1), and this one has the shape "
            f"{shape}. Choose one with output= of predict, such as lambda out: out[:, 0], and fit one for each."
        )
    mean = prediction.mean.detach().double()
    total = prediction.total_std
    scale = torch.ones_like(mean) if total is None else total.detach().double()
    if not (scale > 0).all():
        raise ArgumentError(f"{caller}: total_std must be positive everywhere.")
    return mean, scale
