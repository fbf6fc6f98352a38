"""Networks as they are exported, beside what they are compared with."""

__all__ = ["FrozenNetworks", "Networks"]

from collections.abc import Callable, Sequence
from typing import Any

from ..prediction.batches import Arguments
from .ensemble_graph import EnsembleGraph
from .trace import Named


class Networks(Named):
    """The forward returns the list of the networks' outputs.

    Attributes:
        name: The class of a network, for errors.
        num_samples: The number of networks. Default: ``1``.
        noise_names: The names of the noise that is an input.
        rounded: As in :class:`EnsembleGraph`. Default: None.
    """

    name: str
    num_samples = 1
    noise_names: Sequence[str] = ()
    rounded: tuple[list[Any], list[Any]] | None = None

    def expected(self, *args: Any, **kwargs: Any) -> list[Any]:
        """The same, by what is no part of what is exported."""
        raise NotImplementedError

    def draw(self, seed: int, arguments: Arguments) -> dict[str, Any]:
        """Draw what the forward takes beside these arguments of a network. Default: nothing."""
        return {}


class FrozenNetworks(Networks):
    """Networks that were drawn before, as a ``graph``; ``expected`` gives the list of their outputs in another way."""

    def __init__(self, graph: EnsembleGraph, expected: Callable[..., list[Any]]) -> None:
        super().__init__(graph.signature)
        self.name, self.num_samples, self.rounded = graph.name, graph.num_samples, graph.rounded
        self.graph, self._expected = graph, expected

    def compute(self, *args: Any, **kwargs: Any) -> list[Any]:
        return self.graph.outputs(*args, **kwargs)

    def expected(self, *args: Any, **kwargs: Any) -> list[Any]:
        return self._expected(*args, **kwargs)
