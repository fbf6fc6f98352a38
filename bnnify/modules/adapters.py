"""LoRA adapters: pairs of low-rank factors beside a frozen weight, as the library peft makes them."""

__all__ = ["AdapterPair", "adapter_pairs", "orthogonalize_adapters"]

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentTypeError, ConversionError, check_module
from .settings import is_bayesian

_FACTORS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))


@dataclass(frozen=True, eq=False)
class AdapterPair:
    """One adapter of one layer, which adds ``ΔW = scaling · B·A`` to its weight.

    Attributes:
        names: Those of A and B in the model.
        down: A, of shape ``(rank, in, …)``.
        up: B, of shape ``(out, rank, …)``.
        scaling: The factor on their product.
        base: The weight that ΔW is added to.
    """

    names: tuple[str, str]
    down: nn.Parameter
    up: nn.Parameter
    scaling: float
    base: Tensor


def adapter_pairs(model: nn.Module) -> Iterator[AdapterPair]:
    """Find the adapters in a model, in the order of its modules."""
    for path, module in model.named_modules():
        scaling, base = getattr(module, "scaling", None), getattr(module, "base_layer", None)
        weight = getattr(base, "weight", None)
        if not isinstance(scaling, Mapping) or not isinstance(weight, Tensor):
            continue
        for first, second in _FACTORS:
            downs, ups = getattr(module, first, ()), getattr(module, second, ())
            for adapter in downs:
                if adapter in ups and adapter in scaling:
                    ending = ".weight" if isinstance(downs[adapter], nn.Module) else ""
                    holder = f"{path}." if path else ""
                    yield AdapterPair(
                        (f"{holder}{first}.{adapter}{ending}", f"{holder}{second}.{adapter}{ending}"),
                        _weight(downs[adapter]),
                        _weight(ups[adapter]),
                        float(scaling[adapter]),
                        weight,
                    )


def orthogonalize_adapters(model: nn.Module) -> int:
    """Rewrite each LoRA pair so that the columns of B are orthogonal and equally long; their product B·A stays.

    Noise that is independent in each element of A then moves ΔW in all directions of B's columns alike. As trained,
    these columns point much the same way, and most of the noise goes where the adapter has learned to go. It is the
    basis of Training-Free Bayesianization; call it before :func:`bnnify.convert`.

    With ``B·A = U·diag(s)·Vᵀ``, B becomes ``β·U`` and A becomes ``diag(s)·Vᵀ/β``, where β leaves B as large as it was.
    Outputs stay up to rounding in the dtype of the adapters. A pair that is zero, as a fresh one is, whose rank is
    above the size of its layer, or that shares a factor with another layer stays as it is.

    Args:
        model: A model with adapters of peft, changed in place.

    Returns:
        How many pairs were rewritten.

    Raises:
        ArgumentTypeError: ``model`` is not a module.
        ConversionError: An adapter is Bayesian already, or on the meta device.

    References:
        Shi et al. 2024, "Training-Free Bayesianization for Low-Rank Adapters of Large Language Models", section 3.
    """
    check_module("orthogonalize_adapters(model)", model)
    pairs = list(adapter_pairs(model))
    if any(map(is_bayesian, model.modules())):
        raise ConversionError("The model is Bayesian already. Call orthogonalize_adapters before bnnify.convert.")
    if on_meta := next((name for pair in pairs for name in pair.names if pair.down.is_meta or pair.up.is_meta), None):
        raise ConversionError(f"`{on_meta}` is on the meta device, without values. Load the adapters first.")
    uses = Counter(id(factor) for pair in pairs for factor in (pair.down, pair.up))
    return sum(_orthogonalize(pair) for pair in pairs if uses[id(pair.down)] == uses[id(pair.up)] == 1)


@torch.no_grad()
def _orthogonalize(pair: AdapterPair) -> bool:
    down, up = pair.down.double().flatten(1), pair.up.double().flatten(1)
    if len(down) > min(down.shape[1], len(up)):
        return False
    # The singular values of the product from factors of size rank × rank.
    up_basis, up_triangle = torch.linalg.qr(up)
    down_basis, down_triangle = torch.linalg.qr(down.T)
    left, values, right = torch.linalg.svd(up_triangle @ down_triangle.T)
    if not values[0] > 0:
        return False
    length = up.norm() / len(down) ** 0.5
    pair.up.copy_((length * up_basis @ left).reshape(pair.up.shape))
    pair.down.copy_((values[:, None] * right @ down_basis.T / length).reshape(pair.down.shape))
    return True


def _weight(factor: Any) -> nn.Parameter:
    weight = factor.weight if isinstance(factor, nn.Module) else factor
    if not isinstance(weight, nn.Parameter):
        raise ArgumentTypeError(f"A factor of an adapter is a {type(weight).__name__}, and no parameter.")
    return weight
