"""The log probability of targets, after checks that they are of the kind that the output predicts."""

__all__ = ["log_prob_of"]

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution

from ..errors import ArgumentError, check_tensor
from ..prediction.likelihood import IGNORED


def log_prob_of(
    target: Any, distribution: Distribution, ignore_index: int = IGNORED, caller: str = "tune_std"
) -> Tensor:
    """log p(y) of each datum in ``target``, a vector in float64, without the classes and answers that are ignored.

    Raises:
        ArgumentError: The target has not the shape of what the distribution draws, or holds numbers that are no
            classes; or ``ignore_index`` is given for something else than classes and yes/no answers.
        ArgumentTypeError: The target of classes is no tensor; ``caller`` stands in the message.
    """
    if not isinstance(distribution, (Categorical, Bernoulli)):
        if ignore_index != IGNORED:
            raise ArgumentError(
                f"ignore_index={ignore_index!r} is for targets that are classes or yes/no answers, not for those of a "
                f"{type(distribution).__name__}."
            )
        _check_shape(target, distribution, caller)
        return distribution.log_prob(target).flatten().double()
    check_tensor(f"{caller}: a target", target, "Make the batches (inputs, torch.as_tensor(target)).")
    _check_shape(target, distribution, caller)
    counts = target != ignore_index
    labels = torch.where(counts, target, 0)
    _check_labels(labels, distribution, caller)
    labels = labels.to(torch.long if isinstance(distribution, Categorical) else distribution.logits.dtype)
    return distribution.log_prob(labels)[counts].double()


def _check_shape(target: Any, distribution: Distribution, caller: str) -> None:
    """Refuse shapes that would broadcast to something else, such as (N,) against (N, 1), which gives (N, N)."""
    wanted = (*distribution.batch_shape, *distribution.event_shape)
    if isinstance(target, Tensor) and tuple(target.shape) != wanted:
        raise ArgumentError(
            f"{caller}: a target has the shape {tuple(target.shape)}, and what the output predicts "
            f"({type(distribution).__name__}) has the shape {wanted}. Make them alike: reshape the target in the "
            "loader, or the output with output=, as in lambda out: out.squeeze(-1)."
        )


def _check_labels(labels: Tensor, distribution: Categorical | Bernoulli, caller: str) -> None:
    if isinstance(distribution, Bernoulli):
        wanted, fit = "0 or 1", (labels == 0) | (labels == 1)
    else:
        classes = distribution.logits.shape[-1]
        wanted, fit = f"class numbers from 0 to {classes - 1}", (labels >= 0) & (labels < classes) & (labels % 1 == 0)
    if not fit.all():
        raise ArgumentError(
            f"{caller}: targets must be {wanted}, and one is {labels[~fit][0].item()}. Targets that are not to count "
            "have the value ignore_index."
        )
