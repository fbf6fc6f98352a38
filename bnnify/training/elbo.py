"""The evidence lower bound per datum, and weights of its KL that change during training."""

__all__ = ["elbo", "geometric_weight", "linear_warmup"]

import math
from typing import Any

from torch import Tensor

from ..errors import ArgumentError, ArgumentTypeError, as_number, check_tensor, describe


def elbo(nll: Tensor, kl: Tensor, num_data: int, beta: float = 1.0) -> Tensor:
    """``nll + beta * kl / num_data``: the negative evidence lower bound (ELBO) per datum, to minimise.

    For a data set D of N terms, E_q[-log p(D|w)] + KL(q‖p) divided by N is the mean negative log likelihood of a term
    plus KL/N. A batch estimates the mean; the KL belongs to the weights, of which there is one set for all N terms.

    With several draws of the weights for a batch, it is the likelihood terms that are averaged, not the outputs.

    Args:
        nll: The mean negative log likelihood of the batch in nats, a scalar such as ``F.cross_entropy(output, y)``, or
            one for each of K draws, of shape ``(K,)``.
        kl: KL(q‖p) in nats, summed over all weights, as the model returns it: a scalar, or one for each draw.
        num_data: N, the number of terms that ``nll`` averages over in the whole training set: images for a classifier,
            tokens for a language model, pixels for segmentation; the global data set under distributed training.
        beta: The weight of the KL; 1 is the ELBO, less a tempered ("cold") posterior. Default: ``1.0``.

    Raises:
        ArgumentError: ``nll`` or ``kl`` is neither a scalar nor one number for each draw, ``num_data`` is not a
            positive integer, or ``beta`` is negative.
        ArgumentTypeError: ``nll`` or ``kl`` is not a tensor of real numbers, or ``num_data`` or ``beta`` is no number.

    References:
        Blundell et al. 2015, "Weight Uncertainty in Neural Networks", eq. 1.

    Example::

        >>> elbo(torch.tensor(0.5), torch.tensor(2000.0), num_data=10_000)
        tensor(0.7000)
        >>> elbo(torch.tensor([0.5, 0.7]), torch.tensor(2000.0), num_data=10_000)
        tensor(0.8000)
    """
    _check_term("elbo(nll)", nll, "Pass the mean negative log likelihood, such as F.cross_entropy(output, y).")
    _check_term("elbo(kl)", kl, "Pass the second of what the model returns: output, kl = bnn(x).")
    count = as_number("elbo(num_data)", num_data, "It is the size of the training set: len(loader.dataset).")
    if nll.ndim > 1 or kl.shape not in ((), nll.shape):
        raise ArgumentError(
            "elbo takes the mean NLL of a batch and the summed KL: two scalars, or one of each for every draw; their "
            f"shapes are {tuple(nll.shape)} and {tuple(kl.shape)}. Reduce them first (reduction='mean' for the NLL)."
        )
    if isinstance(count, bool) or not 1 <= count < math.inf or count != int(count):
        raise ArgumentError(
            f"num_data is the number of terms in the training set, a positive integer, not {num_data!r}. "
            "It is not the batch size."
        )
    if not as_number("elbo(beta)", beta) >= 0:
        raise ArgumentError(f"beta must not be negative, and is {beta!r}.")
    return nll.mean() + (beta / num_data) * kl.mean()


def _check_term(name: str, term: Any, hint: str) -> None:
    check_tensor(name, term, hint)
    if not term.is_floating_point():
        raise ArgumentTypeError(
            f"{name} must hold real numbers, and {describe(term)} has the dtype {term.dtype}. {hint}"
        )


def linear_warmup(step: int, warmup_steps: int, final: float = 1.0) -> float:
    """``β = final · min(step / warmup_steps, 1)``: the weight of the KL in one training step.

    Early on, while the data have not been fitted, the full KL may pull σ and the means to the prior for good.

    Args:
        step: Counted from 0 through all epochs.
        warmup_steps: The step from which on β is ``final``. With 0 it is ``final`` throughout.
        final: The weight after the warm-up. Default: ``1.0``, the ELBO.

    Raises:
        ArgumentError: A step is negative.
        ArgumentTypeError: One of them is no number.

    References:
        Sønderby et al. 2016, "Ladder Variational Autoencoders", section 2.3 (for latent variables).

    Example::

        >>> [linear_warmup(step, warmup_steps=4) for step in (0, 1, 4, 9)]
        [0.0, 0.25, 1.0, 1.0]
    """
    as_number("linear_warmup(step)", step)
    as_number("linear_warmup(warmup_steps)", warmup_steps)
    as_number("linear_warmup(final)", final)
    if step < 0 or warmup_steps < 0:
        raise ArgumentError(f"Steps count from 0; found step={step!r} and warmup_steps={warmup_steps!r}.")
    return final if step >= warmup_steps else final * step / warmup_steps


def geometric_weight(batch: int, num_batches: int) -> float:
    """``β = M·2^(M-i) / (2^M - 1)``: the weight of the KL in the i-th of the M batches of an epoch, counted from 1.

    The first batches of an epoch are ruled by the prior, the later ones by the data. Over an epoch β averages 1. With
    many batches all of the KL falls on the first ten or so.

    Args:
        batch: The number of the batch within its epoch, counted from 0 as ``enumerate`` does: i - 1.
        num_batches: M, the number of batches in an epoch.

    Raises:
        ArgumentError: ``batch`` is not one of the epoch.
        ArgumentTypeError: One of them is no number.

    References:
        Blundell et al. 2015, "Weight Uncertainty in Neural Networks", section 3.4.

    Example::

        >>> [round(geometric_weight(batch, 3), 3) for batch in range(3)]
        [1.714, 0.857, 0.429]
    """
    as_number("geometric_weight(batch)", batch, "It counts the batches of an epoch, as enumerate(loader) does.")
    as_number("geometric_weight(num_batches)", num_batches, "It is len(loader).")
    if not 0 <= batch < num_batches:
        raise ArgumentError(f"batch counts from 0 to num_batches - 1; found {batch!r} of {num_batches!r}.")
    # Divided through by 2^M, which no float holds for an epoch of two thousand batches.
    return num_batches * 2.0 ** -(batch + 1) / (1.0 - 2.0**-num_batches)
