"""A network whose noise is an input, so that whoever runs it draws another network with each call."""

__all__ = ["NOISE", "NoisyNetwork", "signature_with_noise"]

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
from ..modules.parameters import noisy_parameters
from ..prediction.batches import Arguments, choose
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
        super().__init__(signature_with_noise(root))
        noisy = noisy_parameters(root)
        if others := [p.name for p in noisy if not p.has_rho]:
            raise ArgumentError(_refusal(root, f"the posterior of `{others[0]}` is not mean-field"))
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

    def draw(self, seed: int, arguments: Arguments) -> dict[str, Any]:
        on_cpu: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed), "device": "cpu"}
        return {NOISE: {p.name: torch.randn(p.mean.shape, **on_cpu).to(p.mean) for p in self._noisy}}


def signature_with_noise(root: nn.Module) -> inspect.Signature:
    """The signature of a converted model's forward, with one more argument, the noise.

    Raises:
        ArgumentError: It has an argument of that name already, or there is no noise that it could take.
    """
    signature = inspect.signature(root.forward)
    if NOISE in signature.parameters:
        raise ArgumentError(_refusal(root, "its forward has an argument of that name"))
    if not noisy_parameters(root):
        raise ArgumentError(_refusal(root, "no weight has noise"))
    listed = list(signature.parameters.values())
    last = len(listed) - (bool(listed) and listed[-1].kind is inspect.Parameter.VAR_KEYWORD)
    listed.insert(last, inspect.Parameter(NOISE, inspect.Parameter.KEYWORD_ONLY))
    return signature.replace(parameters=listed)


def _refusal(root: nn.Module, found: str) -> str:
    return f"{type(root).__name__} cannot take its noise as an input: {found}."
