"""What the output of a model means: its probabilities, their entropy, and the parts of a Gaussian."""

__all__ = ["Likelihood", "entropy", "one_tensor", "pair_of", "probabilities"]

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from .posterior import at_least_float32

Likelihood = Literal["values", "logits", "probabilities", "binary_logits", "gaussian"]


def probabilities(value: Tensor, likelihood: str, class_dim: int) -> Tensor:
    if likelihood == "logits":
        return at_least_float32(value).softmax(class_dim)
    if likelihood == "binary_logits":
        return at_least_float32(value).sigmoid()
    return value


def entropy(probabilities: Tensor, likelihood: str, class_dim: int) -> Tensor:
    if likelihood == "binary_logits":
        return torch.special.entr(probabilities) + torch.special.entr(1 - probabilities)
    return torch.special.entr(at_least_float32(probabilities)).sum(class_dim)


def one_tensor(found: Any, likelihood: str) -> Tensor:
    if isinstance(found, Tensor):
        return found
    keys = f" with the keys {list(found)}" if isinstance(found, Mapping) else ""
    raise TypeError(
        f"predict(likelihood={likelihood!r}) needs a tensor, but the model returned {type(found).__name__}{keys}. "
        "Say which part of it with output=: a key, an attribute, an index, or a function."
    )


def pair_of(found: Any) -> tuple[Tensor, Tensor]:
    if isinstance(found, (tuple, list)) and len(found) == 2 and all(isinstance(part, Tensor) for part in found):
        return found[0], found[1]
    raise TypeError(
        f"predict(likelihood='gaussian') needs a pair of tensors (mean, variance), but the model returned "
        f"{type(found).__name__}. Make the pair with output=, for example lambda out: (out[:, 0], out[:, 1].exp())."
    )
