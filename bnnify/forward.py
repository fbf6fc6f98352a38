"""What one forward of a Bayesian model draws: a sample of each parameter, or what its layer's estimator needs."""

__all__ = ["ForwardNoise"]

from torch import Tensor

from .draw import weight_sample
from .estimators import ESTIMATORS, Estimator, token
from .parameters import BayesianParameter


class ForwardNoise:
    """Makes what a draw that is for one forward alone holds of each parameter."""

    def __init__(self) -> None:
        self._number: int | None = None

    def __call__(self, parameter: BayesianParameter) -> Tensor | Estimator:
        return self._estimator(parameter) or weight_sample(parameter)

    def _estimator(self, parameter: BayesianParameter) -> Estimator | None:
        settings = parameter.settings
        estimator = ESTIMATORS[settings.estimator]
        # A prior may need the sample itself, and of a sharded parameter no rank has the whole.
        if estimator is None or settings.prior.needs_sample or hasattr(parameter.mean, "full_tensor"):
            return None
        self._number = self._number or token()
        if settings.called_again is not None and settings.called_again != self._number:
            return None
        return estimator(parameter.kept_mean, parameter.rho, self._number)
