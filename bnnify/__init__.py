"""bnnify turns a trained PyTorch model into a Bayesian one, and back."""

__all__ = [
    "Audit",
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
    "audit",
    "collapse",
    "convert",
    "elbo",
    "load",
    "load_weights",
    "register_layer",
    "save",
]

from .audit import Audit, audit
from .checkpoint import load, load_weights, save
from .convert import collapse, convert
from .draw import Draw
from .errors import BnnifyError, CheckpointError, ConversionError, DrawError
from .model import BayesianModel
from .objective import elbo
from .posterior import Moped, Relative
from .prediction import Prediction
from .priors import Gaussian, Pretrained, Prior
from .registry import register_layer
from .report import ConversionReport
