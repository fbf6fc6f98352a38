"""Draws: the sample that reading a Bayesian parameter gives now, and again in backward."""

__all__ = ["Draw", "Estimator", "Flipout", "Local", "noise_like"]

from .draw import Draw
from .estimators import Estimator, Flipout, Local
from .noise import noise_like
