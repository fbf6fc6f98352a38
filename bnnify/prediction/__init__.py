"""Averages over networks from the posterior."""

__all__ = ["Likelihood", "Prediction", "predict"]

from .averages import Prediction
from .likelihood import Likelihood
from .predict import predict
