"""Accuracy versus uncertainty calibration (AvUC), a loss for classifiers that are certain where they err."""

__all__ = ["avuc_loss", "uncertainty_threshold"]

import torch
from torch import Tensor

from ..distributions.gaussian import at_least_float32
from ..errors import ArgumentError, as_number, check_tensor
from ..prediction.known_likelihoods import Probabilities


def avuc_loss(
    probabilities: Tensor, labels: Tensor, threshold: float | Tensor, uncertainty: Tensor | None = None
) -> Tensor:
    """log(1 + (n_AU + n_IC) / (n_AC + n_IU)), with n for predictions accurate or inaccurate, certain or uncertain.

    A prediction is certain if its uncertainty u is not above the threshold. It counts p·(1 - tanh u) for n_AC, p·tanh u
    for n_AU, (1 - p)·(1 - tanh u) for n_IC and (1 - p)·tanh u for n_IU, where p is the probability of the predicted
    class, through which gradients flow. The loss is 0 if no prediction is accurate and uncertain, or inaccurate and
    certain.

    Add it to the ELBO once the network has learnt enough for the threshold to mean something:
    ``elbo(nll, kl, num_data) + beta * avuc_loss(...)``.

    Args:
        probabilities: The predictive distribution, averaged over draws, with the classes in the last dimension.
        labels: The true classes, of the same shape without that dimension.
        threshold: See :func:`uncertainty_threshold`.
        uncertainty: u for each prediction, not negative, such as the mutual information. Default: the entropy of
            ``probabilities`` in nats.

    Raises:
        ArgumentError: The shapes do not fit.
        ArgumentTypeError: An argument is no tensor, or the threshold no number.

    References:
        Krishnan, Tickoo 2020, "Improving model calibration with accuracy versus uncertainty optimization".

    Example::

        >>> probabilities = bnn.sample(x, num_samples=8).softmax(-1).mean(0)
        >>> threshold = 0.4  # from uncertainty_threshold, on predictions for more than this batch
        >>> bool(avuc_loss(probabilities, y, threshold) >= 0)
        True
    """
    probabilities, uncertainty = _checked(probabilities, labels, uncertainty)
    if not isinstance(threshold, Tensor):
        as_number("avuc_loss(threshold)", threshold, "uncertainty_threshold gives one.")
    confidence, prediction = probabilities.max(-1)
    accurate = prediction == labels
    certain = uncertainty <= threshold
    degree = uncertainty.tanh()
    count = torch.where(accurate, confidence, 1 - confidence.clamp(max=1)) * torch.where(certain, 1 - degree, degree)
    right = accurate == certain  # accurate and certain, or inaccurate and uncertain
    good, bad = torch.where(right, count, 0.0).sum(), torch.where(right, 0.0, count).sum()
    return torch.log1p(bad / (good + torch.finfo(good.dtype).eps))  # finite where nothing is right, or nothing at all


@torch.no_grad()
def uncertainty_threshold(probabilities: Tensor, labels: Tensor, uncertainty: Tensor | None = None) -> float:
    """The threshold for :func:`avuc_loss`: midway between the mean uncertainties of right and of wrong predictions.

    Take it from predictions of the network in training, on the training or on validation data, after its first epochs;
    it may follow the network from epoch to epoch.

    Args:
        probabilities: As in :func:`avuc_loss`.
        labels: As there.
        uncertainty: As there.

    Raises:
        ArgumentError: The shapes do not fit, the probabilities are none, or the predictions are all accurate or all
            inaccurate.
        ArgumentTypeError: An argument is no tensor.

    Example::

        >>> uncertainty_threshold(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([0, 1]))  # (0 + log 2) / 2
        0.3465735912322998
    """
    probabilities, uncertainty = _checked(probabilities, labels, uncertainty)
    Probabilities(class_dim=-1).check((probabilities,))
    accurate = probabilities.argmax(-1) == labels
    if accurate.all() or not accurate.any():
        kind = "accurate" if accurate.all() else "inaccurate"
        raise ArgumentError(
            f"All {accurate.numel()} predictions are {kind}, and the threshold lies between the mean uncertainties of "
            "accurate and inaccurate ones. Take it from more predictions, or from validation data."
        )
    return ((uncertainty[accurate].mean() + uncertainty[~accurate].mean()) / 2).item()


def _checked(probabilities: Tensor, labels: Tensor, uncertainty: Tensor | None) -> tuple[Tensor, Tensor]:
    check_tensor("AvUC: the probabilities", probabilities, "Pass bnn.sample(x, num_samples=8).softmax(-1).mean(0).")
    check_tensor("AvUC: the labels", labels)
    if uncertainty is not None:
        check_tensor("AvUC: the uncertainty", uncertainty)
    found = [tuple(probabilities.shape), tuple(labels.shape)]
    if probabilities.ndim == 0 or found[0][:-1] != found[1]:
        raise ArgumentError(
            f"AvUC takes probabilities with the classes in the last dimension, averaged over draws, and labels of the "
            f"same shape without it; their shapes are {found[0]} and {found[1]}."
        )
    if uncertainty is not None and uncertainty.shape != labels.shape:
        raise ArgumentError(
            f"AvUC takes one uncertainty for each label; their shapes are {tuple(uncertainty.shape)} and {found[1]}."
        )
    probabilities = at_least_float32(probabilities)
    if uncertainty is None:
        # Not torch.special.entr, whose gradient is infinite where a probability is zero.
        uncertainty = -(probabilities * probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()).sum(-1)
    return probabilities, at_least_float32(uncertainty)
