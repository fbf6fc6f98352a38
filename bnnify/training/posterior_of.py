"""The posterior of a model as the prior of what it learns next."""

__all__ = ["posterior_of"]

import glob

import torch
from torch import nn

from ..distributions.elementwise import Elementwise
from ..distributions.gaussian import std
from ..errors import ConversionError, check_module
from ..model import BayesianModel
from ..modules.parameters import bayesian_parameters


@torch.no_grad()
def posterior_of(bnn: nn.Module) -> dict[str, Elementwise]:
    """Return the posterior of ``bnn`` as a prior: N(μ, σ²) of each weight as it is now.

    It is a mapping from names to priors, as ``convert(prior=...)`` takes it, so that what was learned of one task holds
    while the next one is learned. The model starts where it is, with a KL of zero. What has another name, such as the
    head of a new task, gets the default, or what is added to the mapping.

    Args:
        bnn: A :class:`BayesianModel`, or any module that contains converted layers. Its posteriors are ``MeanField()``.

    Raises:
        ConversionError: Nothing in it is Bayesian, a posterior is of another family, or weights of it were pruned.

    References:
        Nguyen et al. 2018, "Variational Continual Learning", eq. 4.

    Example::

        >>> bnn = bnnify.convert(nn.Linear(3, 2))
        >>> bnn = bnnify.convert(bnnify.collapse(bnn), prior=bnnify.posterior_of(bnn))
        >>> bnn.kl().item()
        0.0
    """
    check_module("posterior_of(bnn)", bnn)
    found = {}
    for parameter in bayesian_parameters(bnn.module if isinstance(bnn, BayesianModel) else bnn):
        if not parameter.has_rho or parameter.has_pruned:
            has = "weights that were pruned" if parameter.has_pruned else f"posterior={parameter.posterior}"
            raise ConversionError(
                f"`{parameter.name}` cannot be the prior of anything: it has {has}, and a prior needs some width for "
                "each weight. Leave it out of the model that you convert, or take the posterior before."
            )
        prior = Elementwise(parameter.mean.detach().clone(), std(parameter.rho).detach())
        found[glob.escape(parameter.name)] = prior
    if not found:
        raise ConversionError("The model has no posterior: convert it, and train it, first.")
    return found
