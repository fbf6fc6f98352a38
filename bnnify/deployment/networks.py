"""Networks as they are exported, beside plain ones that they are compared with."""

__all__ = ["FrozenNetworks", "Networks"]

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..prediction.batches import Arguments, choose
from .ensemble_graph import EnsembleGraph
from .trace import Named, Output


class Networks(Named):
    """The forward returns the list of the networks' outputs.

    Attributes:
        name: The class of a network, for errors.
        noise_names: The names of the noise that is an input.
    """

    name: str
    noise_names: Sequence[str] = ()

    def expected(self, *args: Any, **kwargs: Any) -> list[Any]:
        """The same, by plain networks that are no part of what is exported."""
        raise NotImplementedError

    def draw(self, seed: int, arguments: Arguments) -> dict[str, Any]:
        """Draw what the forward takes beside these arguments of a network. Default: nothing."""
        return {}


class FrozenNetworks(Networks):
    """Networks that were drawn before, as an :class:`EnsembleGraph`, of which this takes the arguments."""

    def __init__(
        self, networks: Sequence[nn.Module], arguments: Arguments, output: Output, dynamic_shapes: Any
    ) -> None:
        super().__init__(inspect.signature(networks[0].forward))
        self.name = type(networks[0]).__name__
        self._plain, self._output = list(networks), output
        self.ensemble = EnsembleGraph(networks, arguments, output, dynamic_shapes)

    def compute(self, *args: Any, **kwargs: Any) -> list[Any]:
        return self.ensemble.outputs(*args, **kwargs)

    def expected(self, *args: Any, **kwargs: Any) -> list[Any]:
        return [choose(network(*args, **kwargs), self._output) for network in self._plain]
