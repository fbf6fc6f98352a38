"""bnnify turns a trained PyTorch model into a Bayesian one, and back."""

__all__ = [
    "BayesianModel",
    "BnnifyError",
    "CheckpointError",
    "ConversionError",
    "ConversionReport",
    "Draw",
    "DrawError",
    "Gaussian",
    "Moped",
    "Prediction",
    "Pretrained",
    "Prior",
    "Relative",
    "collapse",
    "convert",
    "elbo",
    "load",
    "load_weights",
    "save",
]

from .checkpoint import load, load_weights, save
from .convert import collapse, convert
from .draw import Draw
from .errors import BnnifyError, CheckpointError, ConversionError, DrawError
from .model import BayesianModel
from .objective import elbo
from .posterior import Moped, Relative
from .prediction import Prediction
from .priors import Gaussian, Pretrained, Prior
from .report import ConversionReport
