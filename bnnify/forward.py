"""What one forward of a Bayesian model draws: a sample of each parameter and its KL, or what an estimator needs."""

__all__ = ["ForwardNoise"]

from torch import Tensor

from .draw import weight_sample
from .estimators import ESTIMATORS, Estimator, token
from .parameters import BayesianParameter


class ForwardNoise:
    """Makes what a draw that is for one forward alone holds of each parameter.

    Attributes:
        kls: The KL in nats of each parameter of which it came with the sample, by the id of the mean.
    """

    def __init__(self) -> None:
        self.kls: dict[int, Tensor] = {}
        self._number: int | None = None

    def __call__(self, parameter: BayesianParameter) -> Tensor | Estimator:
        estimator = self._estimator(parameter)
        if estimator is not None:
            return estimator
        both = parameter.sample_and_kl()
        if both is None:
            return weight_sample(parameter)
        drawn, self.kls[id(parameter.mean)] = both
        return drawn

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
