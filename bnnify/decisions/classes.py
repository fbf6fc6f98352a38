"""Probabilities of classes, and the labels that belong to them, in the form that decisions need."""

__all__ = ["class_probabilities", "labelled_probabilities", "rows_of_classes"]

from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, ArgumentTypeError, check_tensor, describe
from ..prediction.averages import Prediction


def class_probabilities(caller: str, prediction: Any) -> Tensor:
    """The mean probabilities with the classes in the last dimension, in float64; of yes/no answers those of both.

    Raises:
        ArgumentError: The prediction is that of a regression, or not finite.
        ArgumentTypeError: It is no prediction.
    """
    if not isinstance(prediction, Prediction):
        raise ArgumentTypeError(f"{caller} takes a Prediction, as bnn.predict gives it, not {describe(prediction)}.")
    if prediction.predictive_entropy is None:
        raise ArgumentError(
            f"{caller} needs probabilities of classes, and this prediction has none. Pass predict likelihood='logits', "
            "'probabilities' or 'binary_logits'; of a regression take ConformalIntervals."
        )
    mean = prediction.mean.detach().double()
    found = (
        torch.stack([1 - mean, mean], -1) if prediction.class_dim is None else mean.movedim(prediction.class_dim, -1)
    )
    if not found.isfinite().all():
        raise ArgumentError(f"{caller}: the probabilities are not finite in places.")
    return found


def rows_of_classes(caller: str, prediction: Any) -> Tensor:
    """The probabilities of :func:`class_probabilities`, if their shape is (N, classes).

    Raises:
        ArgumentError: They have another shape: pixels of one image, or tokens of one text, are no data that stand for
            others by themselves.
    """
    found = class_probabilities(caller, prediction)
    if prediction.class_dim is None and found.ndim == 3 and found.shape[1] == 1:
        found = found.squeeze(1)  # of yes/no answers of shape (N, 1)
    if found.ndim != 2:
        raise ArgumentError(
            f"{caller} is for one answer for each example, probabilities of shape (N, classes), and these have the "
            f"shape {tuple(found.shape)}: pixels or tokens of one example are not independent, and nothing could be "
            "guaranteed. Reduce them to one answer for each example."
        )
    return found


def labelled_probabilities(caller: str, probabilities: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
    """Check the labels, and bring both into one form: probabilities of shape (N, classes) and labels of shape (N,).

    Raises:
        ArgumentError: There are no data, or the labels have another shape or are no class numbers.
        ArgumentTypeError: The labels are no tensor.
    """
    check_tensor(f"{caller}: the targets", targets, "Pass torch.as_tensor(targets).")
    shape, classes = probabilities.shape[:-1], probabilities.shape[-1]
    if _squeezed(targets.shape) != _squeezed(shape) or not targets.numel():
        raise ArgumentError(
            f"{caller} got targets of shape {tuple(targets.shape)} for probabilities of shape "
            f"{tuple(probabilities.shape)}; it takes class numbers of shape {tuple(shape)}, at least one."
        )
    labels = targets.to(probabilities.device).flatten()
    wrong = (labels < 0) | (labels >= classes) | (labels % 1 != 0)
    if wrong.any():
        raise ArgumentError(
            f"{caller}: targets must be class numbers from 0 to {classes - 1}, and one is {labels[wrong][0].item()}."
        )
    return probabilities.reshape(-1, classes), labels.long()


def _squeezed(shape: torch.Size) -> tuple[int, ...]:
    """The shape, with (N, 1) as (N,): one answer for each example."""
    return tuple(shape[:1] if len(shape) == 2 and shape[1] == 1 else shape)
