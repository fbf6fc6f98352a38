"""The predictive distribution of a model in which only the last linear layer is Bayesian, from one forward."""

__all__ = ["averaged_in_closed_form"]

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..distributions.gaussian import at_least_float32, std
from ..draws.draw import Draw
from ..draws.noise import noise_like
from ..draws.sharding import is_distributed
from ..errors import ArgumentError
from ..modules.parameters import BayesianParameter, bayesian_parameters
from ..torch_internals import tree_leaves
from .averages import Averages, Prediction
from .batches import Arguments, called_with, choose, rows_of
from .known_likelihoods import BinaryLogits, Logits, Values
from .likelihood import Likelihood


def averaged_in_closed_form(
    module: nn.Module,
    arguments: Arguments,
    num_samples: int,
    likelihood: Likelihood,
    output: str | int | Callable[[Any], Any] | None = None,
    seed: int | None = None,
) -> Prediction:
    """Average over the networks of a model for one batch, from the distribution of its output given the input.

    With x the input of the layer, y = Wx + b is normal with mean ``μ_W x + μ_b`` and variance ``σ_W² x² + σ_b²``, and
    its units are independent. ``"values"`` are given by that; of logits ``num_samples`` independent ones are drawn.

    Raises:
        ArgumentError: Noise is not in one linear layer alone, or the output is not what that returned; or the
            likelihood is another one, or puts together what is not independent.
    """
    if not isinstance(likelihood, (Values, Logits, BinaryLogits)):
        raise ArgumentError(
            f"closed_form=True is for likelihood='values', 'logits' and 'binary_logits', not {likelihood.name!r}. "
            "Leave closed_form out."
        )
    layer = _LastLayer(module)
    args, kwargs = arguments
    with layer, layer.draw:
        with called_with(module, arguments):
            found = module(*args, **kwargs)
        mean, deviation = layer.moments_of(choose(found, output))
    if isinstance(likelihood, Values):
        return Prediction(mean, deviation, num_samples)
    if likelihood.class_dim not in (None, -1, mean.ndim - 1):
        raise ArgumentError(
            f"closed_form=True draws the units of a linear layer, its last dimension, and class_dim="
            f"{likelihood.class_dim} puts together others, which have weights in common. Leave closed_form out."
        )
    averages = Averages(likelihood, rows_of(arguments))
    generator = None if seed is None else torch.Generator(mean.device).manual_seed(seed)
    for _ in range(num_samples):
        averages.add(torch.addcmul(mean, deviation, noise_like(mean, generator)))
    return averages.prediction()


_METADATA = (torch.Tensor.dtype.__get__, torch.Tensor.device.__get__, torch.Tensor.shape.__get__)  # type: ignore[attr-defined]
"""What may be asked of a weight: it tells nothing of its values."""


class _LastLayer(TorchFunctionMode):
    """Find the linear layer that has the noise while a forward runs, and keep mean and variance of its output.

    In ``draw`` a noisy weight reads as a stand-in without memory. ``F.linear`` may have it, once; any other function of
    torch's is refused it. It is NaN, so that code which torch does not show to a mode cannot compute with it unseen.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._model = type(module).__name__
        self._parameters: dict[int, BayesianParameter] = {}
        self._returned: Tensor | None = None
        self.draw = Draw(list(bayesian_parameters(module)), self._stand_in)

    def _stand_in(self, parameter: BayesianParameter) -> Tensor:
        mean = parameter.mean
        if not parameter.posterior.has_noise:
            return mean
        if is_distributed(mean):
            self._refuse(f"`{parameter.name}` is sharded.")
        if not parameter.has_rho:
            self._refuse(f"`{parameter.name}` has the posterior {parameter.posterior}, which is not MeanField().")
        stand_in = mean.detach().new_full((), torch.nan).expand(mean.shape)  # kept by the draw, and so its id
        self._parameters[id(stand_in)] = parameter
        return stand_in

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        used = [leaf for leaf in tree_leaves((args, kwargs)) if id(leaf) in self._parameters]
        if not used or func in _METADATA:
            return func(*args, **kwargs)
        parameter = self._parameters[id(used[0])]
        where = f"`{parameter.name}` ({type(parameter.module).__name__})"
        if func is not F.linear:
            self._refuse(f"{where} is also Bayesian, or has another use, in {getattr(func, '__name__', func)}().")
        if self._returned is not None:
            self._refuse(f"{where} is not the first Bayesian layer, or is called twice.")
        return self._linear(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if id(input) in self._parameters:
            self._refuse(f"`{self._parameters[id(input)].name}` is the input of a layer.")
        if input.is_nested:
            self._refuse("the input of the Bayesian layer is a nested tensor.")
        weight_mean, weight_variance = self._moments(weight)
        bias_mean, bias_variance = (None, None) if bias is None else self._moments(bias)
        self._returned = F.linear(input, weight_mean, bias_mean)
        self._copy = self._mean = self._returned.clone()
        x = at_least_float32(input)
        with torch.autocast(input.device.type, enabled=False):
            if self._copy.dtype in (torch.float16, torch.bfloat16):
                wide_bias = None if bias_mean is None else at_least_float32(bias_mean)
                self._mean = F.linear(x, at_least_float32(weight_mean), wide_bias)
            self._std = F.linear(x.square(), weight_variance, bias_variance).sqrt()
        return self._returned

    def _moments(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of a weight or bias; the variance of one without noise is zero."""
        parameter = self._parameters.get(id(tensor))
        if parameter is None:
            return tensor, torch.zeros_like(at_least_float32(tensor))
        return parameter.kept_mean, std(at_least_float32(parameter.rho)).square()

    def moments_of(self, found: Any) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the chosen output ``found``, in float32 or better."""
        if self._returned is None:
            self._refuse("the forward called no linear layer with a mean-field posterior.")
        if found is not self._returned:
            self._refuse("something is computed from what the Bayesian layer returns, or another output is chosen.")
        if not torch.allclose(found, self._copy, rtol=0, atol=0, equal_nan=True):
            self._refuse("the forward writes into what the Bayesian layer returned.")
        return self._mean, self._std

    def _refuse(self, reason: str) -> NoReturn:
        raise ArgumentError(
            f"closed_form=True is exact where one linear layer has all the noise and returns the output of the model, "
            f"and in {self._model} {reason} Convert with select= the last layer alone, choose with output= what it "
            "returns, or leave closed_form out."
        )
