"""Abstain from answers that are not sure enough, so that those given are wrong seldom enough."""

__all__ = ["Abstention"]

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArgumentError, check_share, needing
from ..prediction.averages import Prediction
from .classes import labelled_probabilities, rows_of_classes

_SHARES = 20
"""How many shares of the data are tried: all, 95 %, 90 % and so on."""


@dataclass(frozen=True)
class Abstention:
    """Accept an answer if the probability of its class is above a threshold; of those accepted few are wrong.

    With probability ``confidence`` over the held-out data, no more than the share ``risk`` of accepted answers on new
    data of the same distribution is wrong: the threshold is the lowest at which the upper confidence bound of the error
    rate (Clopper, Pearson 1934; Bonferroni over the thresholds that were tried) is at most ``risk``. It says nothing of
    a single answer or class, nor of data from elsewhere, on which a network may be sure and wrong.

    Attributes:
        threshold: What the largest probability must exceed.
        risk: The largest share of wrong answers among those accepted.
        confidence: With which probability that holds.
        accepted: The share of the held-out data that was accepted.

    References:
        Geifman, El-Yaniv 2017, "Selective Classification for Deep Neural Networks".

    Example::

        >>> rule = bnnify.Abstention.fit(bnn.predict(x, likelihood="logits", seed=0), y, risk=0.05)
        >>> rule(bnn.predict(x_new, likelihood="logits", seed=0))  # True: accept
    """

    threshold: float
    risk: float
    confidence: float
    accepted: float

    @classmethod
    def fit(cls, prediction: Prediction, targets: Tensor, risk: float = 0.05, confidence: float = 0.95) -> "Abstention":
        """Find the threshold on held-out data, with the binomial bounds of SciPy, from the extra ``cli``.

        Args:
            prediction: For held-out data, of classes or yes/no answers, one for each example.
            targets: Their classes, shape (N,).
            risk: Between 0 and 1. Default: ``0.05``, one of twenty.
            confidence: Between 0 and 1. Default: ``0.95``.

        Raises:
            ArgumentError: No threshold can be shown to keep the risk, there are no classes, or the targets do not fit.
            ArgumentTypeError: An argument is of a wrong type.
            MissingLibraryError: SciPy is not installed.
        """
        caller = "Abstention.fit"
        check_share(f"{caller}(risk)", risk)
        check_share(f"{caller}(confidence)", confidence)
        probabilities, labels = labelled_probabilities(caller, rows_of_classes(caller, prediction), targets)
        with needing("scipy", caller):
            from scipy.stats import beta
        sureness, answers = probabilities.max(-1)
        wrong = answers != labels
        ordered, number = sureness.sort(descending=True).values, len(labels)
        least = 1.0
        for share in range(_SHARES, 0, -1):
            count = number * share // _SHARES
            # Given the threshold, the data above it are independent draws of what the rule accepts.
            threshold = ordered[count].item() if count < number else 0.0
            accepted = sureness > threshold
            kept, errors = int(accepted.sum()), int((accepted & wrong).sum())
            bound = float(beta.ppf(1 - (1 - confidence) / _SHARES, errors + 1, kept - errors)) if errors < kept else 1.0
            if bound <= risk:
                return cls(threshold, risk, confidence, kept / number)
            least = min(least, bound)
        raise ArgumentError(
            f"{caller}: no threshold keeps the risk of {risk} with confidence {confidence} on {number} data; the least "
            f"that can be shown is {least:.3g}. Allow more risk, or give more data."
        )

    def __call__(self, prediction: Prediction) -> Tensor:
        """Which answers are accepted, a bool tensor of shape (N,); the answer is the most probable class.

        Raises:
            ArgumentError: The prediction has no classes, or more than one answer for each example.
            ArgumentTypeError: It is no prediction.
        """
        return torch.gt(rows_of_classes("Abstention", prediction).amax(-1), self.threshold)
