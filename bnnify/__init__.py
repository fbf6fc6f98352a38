"""bnnify turns a trained PyTorch model into a Bayesian one, and back."""

__all__ = [
    "Abstention",
    "Audit",
    "BayesianModel",
    "BernoulliNLL",
    "ArgumentError",
    "ArgumentTypeError",
    "BnnifyError",
    "CategoricalNLL",
    "CheckpointError",
    "ConversionError",
    "ConformalIntervals",
    "ConformalSets",
    "ConversionReport",
    "Draw",
    "DrawError",
    "Elementwise",
    "Export",
    "ExportError",
    "FisherStd",
    "Gaussian",
    "GaussianNLL",
    "HeteroscedasticGaussianNLL",
    "Laplace",
    "LoraStd",
    "MonteCarloPrior",
    "MeanField",
    "MissingLibraryError",
    "Moped",
    "Prediction",
    "Point",
    "Pretrained",
    "Prior",
    "PruningReport",
    "Relative",
    "Report",
    "ResponseStd",
    "ScaleMixture",
    "Temperature",
    "TunedStd",
    "audit",
    "avuc_loss",
    "collapse",
    "convert",
    "convert_checkpoint",
    "elbo",
    "evaluate",
    "export",
    "freeze",
    "geometric_weight",
    "linear_warmup",
    "load",
    "load_weights",
    "orthogonalize_adapters",
    "posterior_of",
    "prune",
    "quantize",
    "register_layer",
    "save",
    "signal_to_noise",
    "tune_std",
    "uncertainty_threshold",
    "__version__",
]

from .analysis.audit import Audit, audit
from .analysis.evaluate import evaluate
from .analysis.evaluation_report import Report
from .analysis.pruning import PruningReport, prune, signal_to_noise
from .checkpoints.convert_checkpoint import convert_checkpoint
from .checkpoints.load_weights import load_weights
from .checkpoints.save_load import load, save
from .convert import collapse, convert
from .decisions import Abstention, ConformalIntervals, ConformalSets, Temperature
from .deployment.export import Export, export
from .deployment.freeze import freeze
from .deployment.quantize import quantize
from .distributions.elementwise import Elementwise
from .distributions.initial_std import Moped, Relative
from .distributions.prior import MonteCarloPrior, Prior
from .distributions.priors import Gaussian, Laplace, Pretrained, ScaleMixture
from .draws.draw import Draw
from .errors import (
    ArgumentError,
    ArgumentTypeError,
    BnnifyError,
    CheckpointError,
    ConversionError,
    DrawError,
    ExportError,
    MissingLibraryError,
)
from .model import BayesianModel
from .modules.adapters import orthogonalize_adapters
from .modules.lora_std import LoraStd
from .modules.mean_field import MeanField
from .modules.point import Point
from .modules.registry import register_layer
from .prediction.averages import Prediction
from .report import ConversionReport
from .training.avuc import avuc_loss, uncertainty_threshold
from .training.elbo import elbo, geometric_weight, linear_warmup
from .training.fisher_std import FisherStd
from .training.nll import BernoulliNLL, CategoricalNLL, GaussianNLL, HeteroscedasticGaussianNLL
from .training.posterior_of import posterior_of
from .training.response_std import ResponseStd
from .training.tune_std import tune_std
from .training.tuned_std import TunedStd
from .version import __version__
