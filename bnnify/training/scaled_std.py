"""The σ of a converted model while a factor on them is looked for."""

__all__ = ["ScaledStd", "layers_of", "log_ratio"]

import math
from collections.abc import Iterable

import torch
from torch import nn

from ..distributions.gaussian import is_pruned, rho_from_std, rms_std, std
from ..draws.sharding import is_distributed
from ..modules.initial_posterior import leaves_room
from ..modules.lora_std import LoraStd
from ..modules.parameters import BayesianParameter, bayesian_parameters


class ScaledStd:
    """The σ of one Bayesian parameter, a multiple of its first value, and the scale of a prior that goes by it.

    A ``Pretrained`` prior without a std becomes as wide as the σ, whatever its ``scale``: that is for a σ that was
    guessed, and this one is found from data. One that leaves untrained weights room stays as it is.

    Args:
        parameter: A place of the parameter.
        measure: The size to compare σ with. Default: ``None``, the rms of μ.
    """

    def __init__(self, parameter: BayesianParameter, measure: torch.Tensor | None = None) -> None:
        self.parameter = parameter
        self.measure = measure
        self._rho = parameter.rho.detach().clone()
        initial_std = None if leaves_room(parameter) else parameter.initial_std
        self._scale = None if initial_std is None else initial_std.detach().clone()
        self._places = [parameter]

    def add_place(self, place: BayesianParameter) -> None:
        """Add another place of the same, tied parameter, which may have a buffer of its own."""
        self._places.append(place)

    def multiply(self, log_factor: float) -> None:
        """Set σ to e^``log_factor`` times its first value, and make the prior as wide; pruned weights stay pruned."""
        sigma = std(self._rho) * math.exp(log_factor)
        rho = rho_from_std(sigma)
        self.parameter.rho.copy_(torch.where(is_pruned(self._rho), self._rho, rho))
        if self._scale is not None:
            self._set_scales(rms_std(sigma, self._rho.dtype) / self.parameter.prior.relative_std)

    def restore(self) -> None:
        """Set both to their first values, bit by bit."""
        self.parameter.rho.copy_(self._rho)
        if self._scale is not None:
            self._set_scales(self._scale)

    def _set_scales(self, scale: torch.Tensor) -> None:
        for place in self._places:
            if place.initial_std is not None:
                place.initial_std.copy_(scale)


def layers_of(module: nn.Module) -> dict[str, list[ScaledStd]]:
    """Group the parameters that have a σ, each once, by the qualified name of their (first) module."""
    layers: dict[str, list[ScaledStd]] = {}
    known: dict[int, ScaledStd] = {}
    measures = LoraStd(1.0).measure(module, (parameter.name for parameter in bayesian_parameters(module))).found
    for parameter in bayesian_parameters(module):
        if not parameter.has_rho:
            continue
        if id(parameter.mean) in known:
            known[id(parameter.mean)].add_place(parameter)
        else:
            known[id(parameter.mean)] = ScaledStd(parameter, measures.get(parameter.name))
            layers.setdefault(parameter.name.rpartition(".")[0], []).append(known[id(parameter.mean)])
    return layers


def log_ratio(everything: Iterable[ScaledStd]) -> float:
    """log(rms(σ) / rms(μ)) over all weights as they are now; 0 where one of the two is zero.

    In the place of μ of a LoRA factor stands the σ at which its noise is as large as the weight that it adapts.
    """
    variance, square = 0.0, 0.0
    for scaled in everything:
        mean, measure = scaled.parameter.mean, scaled.measure
        variance += _sum_of_squares(std(scaled.parameter.rho))
        square += _sum_of_squares(mean if measure is None else measure.expand_as(mean))
    return 0.5 * math.log(variance / square) if variance > 0 and square > 0 else 0.0


def _sum_of_squares(tensor: torch.Tensor) -> float:
    total = tensor.double().square().sum()
    return float(total.full_tensor() if is_distributed(total) else total)  # else each rank had that of its own shard
