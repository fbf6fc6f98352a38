"""A network whose noise is on the outputs of its layers, as an input, so that all weights are constants."""

__all__ = ["LocallyNoisyNetwork"]

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..convert import collapse
from ..distributions.gaussian import std
from ..errors import ArgumentError
from ..modules.known_forwards import known_forward
from ..modules.parameters import BayesianParameter, noisy_parameters
from ..modules.settings import plain_class
from ..prediction.batches import Arguments, choose
from .networks import Networks
from .noisy import NOISE, signature_with_noise
from .trace import Output


class LocallyNoisyNetwork(Networks):
    """The mean network, in which each noisy layer returns linear(x; μ) + √linear(x²; σ²)·ε.

    ε is the argument ``noise``: a tensor of the shape of the output for each of these layers, by its name.

    Args:
        root: A converted model, in eval mode.
        arguments: An example of what it is called with.
        output: Which part of its output, as in :func:`~bnnify.prediction.predict`.

    Raises:
        ArgumentError: A noisy weight does not belong to a Linear or a (transposed) convolution that is called once.

    References:
        Kingma, Salimans, Welling 2015, "Variational Dropout and the Local Reparameterization Trick", section 2.3.
    """

    def __init__(self, root: nn.Module, arguments: Arguments, output: Output) -> None:
        super().__init__(signature_with_noise(root))
        self.network = collapse(root)
        self.name = type(self.network).__name__
        self._output, self._given, self._layers = output, dict[str, Tensor](), dict[str, nn.Module]()
        self.variances = nn.ModuleDict()
        for parameter in noisy_parameters(root):
            _check(parameter)
            name = parameter.name.rpartition(".")[0]
            noise_name = f"{name}.output" if name else "output"
            if noise_name not in self._layers:
                layer = self._layers[noise_name] = self.network.get_submodule(name)
                variance = self.variances[noise_name.replace(".", "/")] = _without_weights(layer)
                layer.register_forward_hook(partial(_add_noise, noise_name, variance, self._given))
            variance.get_parameter(parameter.attribute).data = std(parameter.rho).detach().square()
        self.noise_names = list(self.draw(0, arguments)[NOISE])

    def compute(self, *args: Any, noise: Mapping[str, Tensor], **kwargs: Any) -> list[Any]:
        self._given.update(noise)
        try:
            return [choose(self.network(*args, **kwargs), self._output)]
        finally:
            self._given.clear()

    def expected(self, *args: Any, **kwargs: Any) -> list[Any]:
        return self.compute(*args, **kwargs)

    def draw(self, seed: int, arguments: Arguments) -> dict[str, Any]:
        generator, drawn = torch.Generator().manual_seed(seed), dict[str, Tensor]()

        def give(name: str, layer: nn.Module, args: Any, output: Tensor) -> None:
            if name in drawn:
                raise ArgumentError(
                    f"`{name.removesuffix('.output')}` ({type(layer).__name__}) is called more than once in a forward, "
                    "and only a sample of its weights is the same in all calls: export with noise='input'."
                )
            drawn[name] = torch.randn(output.shape, generator=generator, device="cpu").to(output)
            self._given[name] = drawn[name]

        hooks = [layer.register_forward_hook(partial(give, name), prepend=True) for name, layer in self._layers.items()]
        try:
            with torch.no_grad():
                self.network(*arguments[0], **arguments[1])
        finally:
            self._given.clear()
            for hook in hooks:
                hook.remove()
        return {NOISE: drawn}


def _add_noise(name: str, variance: nn.Module, given: Mapping[str, Tensor], layer: Any, args: Any, output: Any) -> Any:
    # Some algorithms for convolutions round a variance of zero to below it.
    return output + variance(args[0].square(), *args[1:]).clamp(min=0.0).sqrt() * given[name]


def _without_weights(layer: nn.Module) -> nn.Module:
    """The same layer on squares, which returns a variance once it has σ² as its weights."""
    made = copy.deepcopy(layer)
    for parameter in made.parameters():
        nn.init.zeros_(parameter)
    return made


def _check(parameter: BayesianParameter) -> None:
    layer, cls = parameter.module, plain_class(parameter.module)
    if not parameter.has_rho:
        found = "its posterior is not mean-field"
    elif known_forward(cls) is None or "forward" in vars(layer):
        found = f"{cls.__name__} is no Linear and no (transposed) convolution with torch's own forward"
    else:
        return
    raise ArgumentError(
        f"The noise of `{parameter.name}` cannot be on the output of its layer: {found}. Export with noise='input'."
    )
