"""The training objective: the evidence lower bound, per datum."""

__all__ = ["elbo"]

import math

from torch import Tensor


def elbo(nll: Tensor, kl: Tensor, num_data: int, beta: float = 1.0) -> Tensor:
    """The negative evidence lower bound (ELBO) per datum, to minimise: ``nll + beta * kl / num_data``.

    For a data set D of N terms, E_q[-log p(D|w)] + KL(q‖p) divided by N is the mean negative log likelihood of a term
    plus KL/N. A batch estimates the mean; the KL belongs to the weights, of which there is one set for all N terms.

    Args:
        nll: The mean negative log likelihood of the batch in nats, a scalar such as ``F.cross_entropy(output, y)``.
        kl: KL(q‖p) in nats, summed over all weights, as the model returns it.
        num_data: N, the number of terms that ``nll`` averages over in the whole training set: images for a classifier,
            tokens for a language model, pixels for segmentation; the global data set under distributed training.
        beta: The weight of the KL; 1 is the ELBO, less a tempered ("cold") posterior. Default: ``1.0``.

    Raises:
        ValueError: ``nll`` or ``kl`` is not a scalar, ``num_data`` is not a positive integer, or ``beta`` is negative.

    References:
        Blundell et al. 2015, "Weight Uncertainty in Neural Networks", eq. 1.

    Example::

        >>> elbo(torch.tensor(0.5), torch.tensor(2000.0), num_data=10_000)
        tensor(0.7000)
    """
    if nll.ndim or kl.ndim:
        raise ValueError(
            f"elbo takes the mean NLL of a batch and the summed KL, two scalars; their shapes are {tuple(nll.shape)} "
            f"and {tuple(kl.shape)}. Reduce them first (reduction='mean' for the NLL)."
        )
    if isinstance(num_data, bool) or not 1 <= num_data < math.inf or num_data != int(num_data):
        raise ValueError(
            f"num_data is the number of terms in the training set, a positive integer, not {num_data!r}. "
            "It is not the batch size."
        )
    if not beta >= 0:
        raise ValueError(f"beta must not be negative, and is {beta!r}.")
    return nll + (beta / num_data) * kl
