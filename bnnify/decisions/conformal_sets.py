"""Sets of classes that hold the true one with a given probability."""

__all__ = ["ConformalSets"]

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, check_share
from ..prediction.averages import Prediction
from .classes import labelled_probabilities, rows_of_classes
from .conformity import finite_sample_quantile, scores_of_classes

_SCORES = ("lac", "aps")


@dataclass(frozen=True)
class ConformalSets:
    """The classes that a held-out threshold leaves: a set that holds the true class with probability ``coverage``.

    ===========  ====================================================================================================
    ``"lac"``    the classes with ``1 - p ≤ threshold``: the smallest sets on average; some may be empty
    ``"aps"``    the most probable classes, until their probabilities sum up to ``threshold``: larger sets where the
                 input is hard, at least one class, and somewhat more coverage than was asked for
    ===========  ====================================================================================================

    If new data are exchangeable with the held-out ones, which the network must not have been trained on, then on
    average over both the true class is in the set with probability ``coverage`` or more, however wrong the
    probabilities are. That is no promise for each class or each input by itself, nor for data that have changed.

    Attributes:
        threshold: The quantile of the held-out scores.
        coverage: The probability that was asked for.
        score: ``"lac"`` or ``"aps"``.

    References:
        Sadinle et al. 2019, "Least Ambiguous Set-Valued Classifiers With Bounded Error Levels". Romano et al. 2020,
        "Classification with Valid and Adaptive Coverage".

    Example::

        >>> sets = bnnify.ConformalSets.fit(bnn.predict(x, likelihood="logits", seed=0), y, coverage=0.9)
        >>> sets(bnn.predict(x_new, likelihood="logits", seed=0)).sum(-1)  # how many classes are in each
    """

    threshold: float
    coverage: float
    score: str

    def __post_init__(self) -> None:
        _check("ConformalSets", self.coverage, self.score)

    @classmethod
    def fit(cls, prediction: Prediction, targets: Tensor, coverage: float = 0.9, score: str = "lac") -> "ConformalSets":
        """Find the threshold on held-out data, with MAPIE, from the extra ``cli``.

        The scores of ``"aps"`` are randomised, from a fixed seed.

        Args:
            prediction: For held-out data, of classes or yes/no answers, one for each example.
            targets: Their classes, shape (N,). N must be at least ``coverage / (1 - coverage)``.
            coverage: Between 0 and 1. Default: ``0.9``.
            score: ``"lac"`` or ``"aps"``: see above. Default: ``"lac"``.

        Raises:
            ArgumentError: There are too few data or no classes, the targets do not fit, or coverage or score are none.
            ArgumentTypeError: An argument is of a wrong type.
            MissingLibraryError: MAPIE is not installed.
        """
        caller = "ConformalSets.fit"
        _check(caller, coverage, score)
        probabilities, labels = labelled_probabilities(caller, rows_of_classes(caller, prediction), targets)
        scores = scores_of_classes(caller, score, probabilities, labels)
        return cls(finite_sample_quantile(caller, scores, coverage), coverage, score)

    def __call__(self, prediction: Prediction) -> Tensor:
        """Which classes are in the set, a bool tensor of shape (N, classes).

        Raises:
            ArgumentError: The prediction has no classes, or more than one answer for each example.
            ArgumentTypeError: It is no prediction.
        """
        probabilities = rows_of_classes("ConformalSets", prediction)
        if self.score == "lac":
            return 1 - probabilities <= self.threshold
        return _sum_of_larger(probabilities) < self.threshold


def _sum_of_larger(probabilities: Tensor) -> Tensor:
    """For each class the sum of the probabilities that are larger than its own."""
    ordered = probabilities.sort(-1).values
    from_here = ordered.flip(-1).cumsum(-1).flip(-1)
    from_here = torch.cat([from_here, torch.zeros_like(from_here[..., :1])], -1)
    return from_here.gather(-1, torch.searchsorted(ordered, probabilities.contiguous(), right=True))


def _check(caller: str, coverage: Any, score: Any) -> None:
    check_share(f"{caller}(coverage)", coverage)
    if score not in _SCORES:
        raise ArgumentError(f"{caller}(score) must be 'lac' or 'aps', not {score!r}.")
