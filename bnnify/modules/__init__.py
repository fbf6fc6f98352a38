"""Which parameters of which modules become Bayesian, and what these modules are then."""

__all__ = [
    "BayesianParameter",
    "Settings",
    "bayesian_parameters",
    "is_bayesian",
    "register_layer",
    "unique_bayesian_parameters",
]

from .parameters import BayesianParameter, Settings, bayesian_parameters, is_bayesian, unique_bayesian_parameters
from .registry import register_layer
