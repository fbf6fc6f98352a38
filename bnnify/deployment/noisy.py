"""A network whose noise is an input, so that whoever runs it draws another network with each call."""

__all__ = ["NOISE", "NoisyNetwork"]

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..convert import collapse
from ..distributions.gaussian import std
from ..errors import ArgumentError
from ..modules.parameters import unique_bayesian_parameters
from ..prediction.batches import choose
from .networks import Networks
from .trace import Output

NOISE = "noise"
"""The argument that takes the noise."""


class NoisyNetwork(Networks):
    """A network with the weights μ + σ·ε, where ε is the argument ``noise``: a tensor for each weight, by its name.

    Each σ stands beside its μ as a buffer, such as ``fc.weight_std``.

    Args:
        root: A converted model, in eval mode.
        output: Which part of its output, as in :func:`~bnnify.prediction.predict`.

    Raises:
        ArgumentError: A posterior is not mean-field, no weight has noise, or the model has an argument ``noise``.
    """

    without_batch = (NOISE,)

    def __init__(self, root: nn.Module, output: Output) -> None:
        noisy = [p for p in unique_bayesian_parameters(root) if p.posterior.has_noise]
        signature = inspect.signature(root.forward)
        others = [p.name for p in noisy if not p.has_rho]
        if others or not noisy or NOISE in signature.parameters:
            found = f"the posterior of `{others[0]}` is not mean-field" if others else "no weight has noise"
            found = "its forward has an argument of that name" if NOISE in signature.parameters else found
            raise ArgumentError(f"{type(root).__name__} cannot take its noise as an input: {found}.")
        listed = list(signature.parameters.values())
        last = len(listed) - (bool(listed) and listed[-1].kind is inspect.Parameter.VAR_KEYWORD)
        listed.insert(last, inspect.Parameter(NOISE, inspect.Parameter.KEYWORD_ONLY))
        super().__init__(signature.replace(parameters=listed))
        self._noisy, self.noise_names = noisy, [p.name for p in noisy]
        self.network = collapse(root)
        self.name = type(self.network).__name__
        self._plain, self._output = [copy.deepcopy(self.network)], output  # in a list: no part of what is exported
        for parameter in noisy:
            place, _, attribute = parameter.name.rpartition(".")
            with torch.no_grad():
                self.network.get_parameter(parameter.name).copy_(parameter.kept_mean)
            self.network.get_submodule(place).register_buffer(f"{attribute}_std", std(parameter.rho).detach())

    def compute(self, *args: Any, noise: Mapping[str, Tensor], **kwargs: Any) -> list[Any]:
        weights = {}
        for name, each in noise.items():
            weights[name] = self.network.get_parameter(name) + self.network.get_buffer(f"{name}_std") * each
        return [choose(functional_call(self.network, weights, args, kwargs), self._output)]

    def expected(self, *args: Any, noise: Mapping[str, Tensor], **kwargs: Any) -> list[Any]:
        (plain,) = self._plain
        for parameter in self._noisy:
            plain.get_parameter(parameter.name).copy_(parameter.posterior.sample(parameter, noise[parameter.name]))
        return [choose(plain(*args, **kwargs), self._output)]

    def draw(self, seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        return {NOISE: {p.name: torch.randn(p.mean.shape, generator=generator).to(p.mean) for p in self._noisy}}
