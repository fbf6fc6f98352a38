"""Bayesian modules: the choice of their parameters, and the classes that they get."""

__all__ = [
    "BayesianParameter",
    "MeanField",
    "Point",
    "PosteriorFamily",
    "Settings",
    "bayesian_parameters",
    "is_bayesian",
    "register_layer",
    "unique_bayesian_parameters",
]

from .mean_field import MeanField
from .parameters import BayesianParameter, bayesian_parameters, unique_bayesian_parameters
from .point import Point
from .posterior import PosteriorFamily
from .registry import register_layer
from .settings import Settings, is_bayesian
