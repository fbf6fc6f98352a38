"""bnnify turns a trained PyTorch model into a Bayesian one, and back."""

__all__ = [
    "Audit",
    "BayesianModel",
    "BernoulliNLL",
    "BnnifyError",
    "CategoricalNLL",
    "CheckpointError",
    "ConversionError",
    "ConversionReport",
    "Draw",
    "DrawError",
    "FisherStd",
    "Gaussian",
    "GaussianNLL",
    "HeteroscedasticGaussianNLL",
    "Laplace",
    "MonteCarloPrior",
    "Moped",
    "Prediction",
    "Pretrained",
    "Prior",
    "PruningReport",
    "Relative",
    "ScaleMixture",
    "audit",
    "avuc_loss",
    "collapse",
    "convert",
    "convert_checkpoint",
    "elbo",
    "freeze",
    "geometric_weight",
    "linear_warmup",
    "load",
    "load_weights",
    "prune",
    "register_layer",
    "save",
    "signal_to_noise",
    "tune_std",
    "uncertainty_threshold",
]

from .audit import Audit, audit
from .averages import Prediction
from .avuc import avuc_loss, uncertainty_threshold
from .checkpoint import load, save
from .convert import collapse, convert
from .draw import Draw
from .errors import BnnifyError, CheckpointError, ConversionError, DrawError
from .fisher import FisherStd
from .freezing import freeze
from .likelihoods import BernoulliNLL, CategoricalNLL, GaussianNLL, HeteroscedasticGaussianNLL
from .model import BayesianModel
from .objective import elbo, geometric_weight, linear_warmup
from .posterior import Moped, Relative
from .pretrained import convert_checkpoint
from .prior import MonteCarloPrior, Prior
from .priors import Gaussian, Laplace, Pretrained, ScaleMixture
from .pruning import PruningReport, prune, signal_to_noise
from .registry import register_layer
from .report import ConversionReport
from .tuning import tune_std
from .weights import load_weights
