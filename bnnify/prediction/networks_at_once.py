"""Several networks in one forward, in which what does not depend on their weights is computed once."""

__all__ = ["NetworksAtOnce"]

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..draws.draw import Draw
from ..draws.sharding import is_distributed
from ..errors import ArgumentError
from ..torch_internals import tree_map, writes_to
from .batches import choose
from .known_code import State
from .sampler import Sampler


class NetworksAtOnce:
    """Run some of a sampler's networks in one forward, by ``torch.func.vmap`` over their samples.

    A layer without a posterior multiplies its weight with the inputs of all networks in one product, and what comes
    before the first Bayesian weight is computed once. They are the networks that the sampler would draw one after
    another; their outputs differ from those by rounding, as the products are larger ones.

    Args:
        module: The model.
        sampler: Draws its networks.
        numbers: Which of them, the next ones in order.

    Raises:
        ArgumentError: The model is sharded.
    """

    def __init__(self, module: nn.Module, sampler: Sampler, numbers: Sequence[int]) -> None:
        self._module, self._sampler, self._count = module, sampler, len(numbers)
        if any(is_distributed(parameter.mean) for parameter in sampler.parameters):
            raise ArgumentError(self._refusal("its parameters are sharded, and vmap does not follow those."))
        drawn: list[dict[int, Tensor]] = []
        for number in numbers:
            sampler.draw(number)
            drawn.append({mean: sample.clone() for mean, sample in sampler.samples.items()})
        self._samples = {mean: torch.stack([each[mean] for each in drawn]) for mean in drawn[0]}

    def forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any = None) -> Iterator[Any]:
        """The chosen output of each network for one batch.

        Raises:
            ArgumentError: ``vmap`` cannot do the model, or its forward keeps something in it.
        """
        state, writes = State(self._module), self._writes()

        def of_one(samples: dict[int, Tensor]) -> Any:
            draw = Draw(self._sampler.parameters, lambda p: samples.get(id(p.mean), p.mean))
            with draw:
                return choose(self._module(*args, **kwargs), output)

        try:
            found = torch.func.vmap(of_one, randomness="different")(self._samples)
        except (ArgumentError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
            raise ArgumentError(self._refusal(f"torch.func.vmap: {reason}.")) from error
        if not state.is_unchanged() or writes != self._writes():
            reason = "its forward keeps something in the model, which the next network would find there."
            raise ArgumentError(self._refusal(reason))
        return (tree_map(lambda leaf, k=k: leaf[k], found) for k in range(self._count))

    def _writes(self) -> list[int]:
        """How often each tensor of the model was written to, which a counter in a buffer is, and a cache."""
        return [writes_to(tensor) for tensor in (*self._module.parameters(), *self._module.buffers())]

    def _refusal(self, reason: str) -> str:
        return (
            f"{type(self._module).__name__} cannot run {self._count} networks in one forward: {reason} Leave "
            "networks_at_once out, which runs them one after another, or choose with output= what is needed."
        )
