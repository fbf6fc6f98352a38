"""A starting σ for the factors of a LoRA adapter, by what the noise in them does to the weight that they adapt."""

__all__ = ["DEFAULT_ADAPTER_STD", "LoraStd", "StdOfPairs"]

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..distributions.gaussian import root_mean_square
from ..distributions.initial_std import Relative, fan_in_scale
from ..draws.sharding import is_distributed
from ..errors import check_positive
from .adapters import AdapterPair, adapter_pairs
from .refusals import is_quantized


@dataclass(frozen=True)
class LoraStd:
    """σ of A and of B such that the noise of ``ΔW = s·B·A`` has ``fraction`` times the rms of the weight W.

    How large A is says nothing about how much noise it bears: that depends on B, by which it is multiplied, and on W,
    to which the product is added. One σ for each factor: with A alone Bayesian, ``σ_A = fraction·rms(W)·√out/(s·‖B‖)``;
    with B alone, ``σ_B = fraction·rms(W)·√in/(s·‖A‖)``; with both, each has half of the variance, and so has their
    product's part in it. While B is zero, noise in A has no effect: B has all of it, and σ_A is ``fraction`` of the
    rms of A.

    :func:`bnnify.convert` uses it with its default fraction for adapters of peft where no ``posterior_std`` is given:
    0.04 of the rms is what the default is for any weight. What else it is given to gets that fraction of its own rms.
    Call :func:`bnnify.orthogonalize_adapters` before, so that the noise has no preferred direction.

    Attributes:
        fraction: Of the rms of W. Must be positive. Default: ``0.04``.
    """

    fraction: float = 0.04

    def __post_init__(self) -> None:
        check_positive("LoraStd(fraction)", self.fraction)

    def measure(self, model: nn.Module, names: Iterable[str]) -> "StdOfPairs":
        """Find σ of the factors that have these names in ``model``."""
        wanted = set(names)
        return StdOfPairs(dict(item for pair in adapter_pairs(model) for item in self._of(pair, wanted)), self)

    def finish(self, bnn: Any) -> None:
        """Do nothing: σ is known when the model is converted."""

    def _of(self, pair: AdapterPair, wanted: set[str]) -> Iterator[tuple[str, Tensor]]:
        """σ of those of its factors that are wanted."""
        if any(factor.is_meta or is_distributed(factor) for factor in (pair.down, pair.up)):
            return
        rank, down, up = len(pair.down), pair.down.detach().double(), pair.up.detach().double()
        width, height = down.numel() / rank, up.numel() / rank
        down_size, up_size = (abs(pair.scaling) * down.norm()).item(), (abs(pair.scaling) * up.norm()).item()
        # The squared size that the noise of ΔW is to have, and that of the part of each factor.
        total = part = (self.fraction * _rms(pair.base, down)) ** 2 * height * width
        if wanted.issuperset(pair.names):  # the noise of both is multiplied, too
            if down_size > 0 and up_size > 0:
                product = rank * (pair.scaling / (down_size * up_size)) ** 2
                part = total / (1 + math.sqrt(1 + product * total))  # of 2·part + product·part² = total
            else:
                part = total / (1 + self.fraction**2)
        for name, size, count in ((pair.names[0], up_size, width), (pair.names[1], down_size, height)):
            if name in wanted and size > 0:
                yield name, down.new_tensor(math.sqrt(part / count) / size)


DEFAULT_ADAPTER_STD = LoraStd()


@dataclass(frozen=True, eq=False)
class StdOfPairs:
    """The rule once the pairs were seen.

    Attributes:
        found: σ of each factor by its name.
        rule: The rule.
    """

    found: Mapping[str, Tensor] = field(repr=False)
    rule: LoraStd

    def __str__(self) -> str:
        return str(self.rule)

    def of(self, names: Sequence[str], weight: Tensor, scale: float, units_dim: int = 0) -> Tensor:
        """σ of the parameter that has these names, of its shape."""
        default = Relative(self.rule.fraction)(weight, scale)
        std = next((self.found[name].to(default) for name in names if name in self.found), default)
        return std.expand_as(weight).clone()


def _rms(base: Tensor, down: Tensor) -> float:
    """The rms of the adapted weight, or what it would be at its initialisation if its numbers cannot be read."""
    if is_quantized(base) and type(base).dequantize is not Tensor.dequantize:  # as torchao's are
        base = base.dequantize()
    if base.is_meta or is_quantized(base) or not base.is_floating_point() or base.numel() == 0:
        return fan_in_scale(down)
    return root_mean_square(base.detach()).item()
