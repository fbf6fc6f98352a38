"""Losses for a converted model, and ways to fit its σ to data."""

__all__ = [
    "BernoulliNLL",
    "CategoricalNLL",
    "FisherStd",
    "GaussianNLL",
    "HeteroscedasticGaussianNLL",
    "ResponseStd",
    "TunedStd",
    "avuc_loss",
    "elbo",
    "geometric_weight",
    "linear_warmup",
    "tune_std",
    "uncertainty_threshold",
]

from .avuc import avuc_loss, uncertainty_threshold
from .elbo import elbo, geometric_weight, linear_warmup
from .fisher_std import FisherStd
from .nll import BernoulliNLL, CategoricalNLL, GaussianNLL, HeteroscedasticGaussianNLL
from .response_std import ResponseStd
from .tune_std import tune_std
from .tuned_std import TunedStd
