"""A temperature on averaged probabilities."""

__all__ = ["Temperature"]

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import ArgumentError, check_positive
from ..prediction.averages import Prediction
from .classes import class_probabilities, labelled_probabilities

_LARGEST = 100.0
"""The largest temperature, and the inverse of the smallest one."""


@dataclass(frozen=True)
class Temperature:
    """``p^(1/T) / Σ p^(1/T)``: averaged probabilities, made less sure (T > 1) or surer (T < 1).

    One number cannot change which class is on top, and so no accuracy. Of one network alone this is temperature scaling
    of its logits.

    Attributes:
        temperature: T.

    References:
        Guo et al. 2017, "On Calibration of Modern Neural Networks". Rahaman, Thiery 2021, "Uncertainty Quantification
        and Deep Ensembles" (after the average, not before).

    Example::

        >>> held_out = bnn.predict(x, likelihood="logits", seed=0)
        >>> temperature = bnnify.Temperature.fit(held_out, y)
        >>> tempered = temperature(held_out)
        >>> torch.equal(tempered.mean.argmax(-1), held_out.mean.argmax(-1))
        True
    """

    temperature: float

    def __post_init__(self) -> None:
        check_positive("Temperature(temperature)", self.temperature, ArgumentError)

    @classmethod
    def fit(cls, prediction: Prediction, targets: Tensor) -> "Temperature":
        """Minimise the NLL of held-out labels over T, from 0.01 to 100. It is convex in 1/T, and has one minimum.

        Args:
            prediction: For held-out data, of classes or yes/no answers.
            targets: Their classes, of the shape of ``prediction.mean`` without the classes.

        Raises:
            ArgumentError: There are no data or no classes, or the targets do not fit.
            ArgumentTypeError: An argument is of a wrong type.
        """
        caller = "Temperature.fit"
        probabilities, labels = labelled_probabilities(caller, class_probabilities(caller, prediction), targets)
        log = _log(probabilities)
        of_label = log.gather(-1, labels[:, None]).mean()
        low, high = torch.tensor([1 / _LARGEST, _LARGEST], dtype=log.dtype, device=log.device).log()
        for _ in range(24):
            middle = (low + high) / 2
            # The derivative of the NLL by 1/T, which grows with 1/T.
            slope = ((middle.exp() * log).softmax(-1) * log).sum(-1).mean() - of_label
            low, high = (low, middle) if slope > 0 else (middle, high)
        return cls((-(low + high) / 2).exp().item())

    def __call__(self, prediction: Prediction) -> Prediction:
        """The prediction with tempered mean and predictive entropy; its ``std`` stays that over the networks.

        It has no expected entropy, and so no mutual information: those of the networks are in ``prediction``.

        Raises:
            ArgumentError: The prediction has no classes.
            ArgumentTypeError: It is no prediction.
        """
        probabilities = self.log_probabilities(prediction).exp()
        dim = prediction.class_dim
        mean = probabilities[..., 1] if dim is None else probabilities.movedim(-1, dim)
        entropy = torch.special.entr(probabilities).sum(-1)
        return replace(
            prediction,
            mean=mean.to(prediction.mean.dtype),
            predictive_entropy=entropy.to(prediction.mean.dtype),
            expected_entropy=None,
        )

    def log_probabilities(self, prediction: Prediction) -> Tensor:
        """The logarithms of the tempered probabilities in float64, with the classes last; of yes/no answers both.

        Raises:
            ArgumentError: The prediction has no classes.
            ArgumentTypeError: It is no prediction.
        """
        return (_log(class_probabilities("Temperature", prediction)) / self.temperature).log_softmax(-1)


def _log(probabilities: Tensor) -> Tensor:
    return probabilities.clamp_min(torch.finfo(torch.float32).tiny).log()
