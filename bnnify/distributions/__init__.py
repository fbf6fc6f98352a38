"""Functions of tensors: the posterior of a weight, the σ it starts with, the priors, and the KL between them."""

__all__ = [
    "Constant",
    "Gaussian",
    "KLTerms",
    "Laplace",
    "MonteCarloPrior",
    "Moped",
    "NamedPosteriorStd",
    "Posterior",
    "PosteriorStd",
    "Pretrained",
    "Prior",
    "Relative",
    "ScaleMixture",
    "log_std",
    "rho_from_std",
    "std",
]

from .gaussian import log_std, rho_from_std, std
from .initial_std import Constant, Moped, NamedPosteriorStd, PosteriorStd, Relative
from .prior import KLTerms, MonteCarloPrior, Posterior, Prior
from .priors import Gaussian, Laplace, Pretrained, ScaleMixture
