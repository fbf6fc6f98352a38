"""What the output of a model means: checks that it can mean that, its probabilities, and their entropy."""

__all__ = [
    "Likelihood",
    "check_likelihood",
    "check_parts",
    "entropy",
    "has_values",
    "parts_of",
    "probabilities",
]

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..checks import check_integer
from ..distributions.gaussian import at_least_float32

Likelihood = Literal["values", "logits", "probabilities", "binary_logits", "gaussian"]

_WITH_CLASSES = ("logits", "probabilities")

_TOLERANCE = 1e-2
"""By how much the sum of probabilities may differ from one: half precision rounds each to three digits."""


def check_likelihood(likelihood: Any, class_dim: Any) -> None:
    """Raise unless the likelihood is known, and the dimension of classes an integer that it makes use of.

    Raises:
        ValueError: It is unknown, or it has no classes.
        TypeError: ``class_dim`` is no integer.
    """
    if likelihood not in get_args(Likelihood):
        raise ValueError(f"Unknown likelihood {likelihood!r}: known are {', '.join(map(repr, get_args(Likelihood)))}.")
    if class_dim is None:
        return
    check_integer("class_dim", class_dim)
    if likelihood not in _WITH_CLASSES:
        raise ValueError(
            f"class_dim={class_dim} is for likelihood='logits' and 'probabilities', and the likelihood here is "
            f"{likelihood!r}."
        )


def has_values(value: Tensor) -> bool:
    """Whether decisions can be made on the values in ``value``: not on the meta device, nor under ``torch.func``."""
    return not value.is_meta and torch._C._functorch.peek_interpreter_stack() is None


def parts_of(found: Any, likelihood: str) -> tuple[Tensor, ...]:
    """The tensors in the output of a model, with strides: mean and variance for ``"gaussian"``, otherwise one.

    Raises:
        TypeError: The output is something else, or of a dtype that cannot mean that.
    """
    parts = _pair_of(found) if likelihood == "gaussian" else (_one_tensor(found, likelihood),)
    return tuple(_with_strides(_of_fitting_dtype(part, likelihood)) for part in parts)


def _one_tensor(found: Any, likelihood: str) -> Tensor:
    if isinstance(found, Tensor):
        return found
    keys = f" with the keys {list(found)}" if isinstance(found, Mapping) else ""
    raise TypeError(
        f"likelihood={likelihood!r} needs a tensor, but the model returned {type(found).__name__}{keys}. "
        "Say which part of it with output=: a key, an attribute, an index, or a function."
    )


def _pair_of(found: Any) -> tuple[Tensor, Tensor]:
    if not (isinstance(found, (tuple, list)) and len(found) == 2 and all(isinstance(part, Tensor) for part in found)):
        raise TypeError(
            f"likelihood='gaussian' needs a pair of tensors (mean, variance), but the model returned "
            f"{type(found).__name__}. Make the pair with output=, for example lambda out: (out[:, 0], out[:, 1].exp())."
        )
    mean, variance = found
    if mean.shape != variance.shape:
        raise ValueError(
            f"likelihood='gaussian' needs a mean and a variance of the same shape; they have {tuple(mean.shape)} and "
            f"{tuple(variance.shape)}. Make them alike with output=."
        )
    return mean, variance


def _of_fitting_dtype(value: Tensor, likelihood: str) -> Tensor:
    if value.is_floating_point():
        return value
    if likelihood == "values":
        if value.is_complex():
            return value
        if value.dtype == torch.bool:
            return value.float()
        raise TypeError(
            f"The model returned integers ({value.dtype}), and an average of decisions, such as class numbers, means "
            "nothing. Let it return what it decides from, such as logits; or, if these are quantities, pass "
            "output=lambda out: out.float()."
        )
    way_out = "a real part of it, such as out.abs()" if value.is_complex() else "what it decides from"
    raise TypeError(
        f"likelihood={likelihood!r} needs real floating-point numbers, and the model returned {value.dtype}. "
        f"Return {way_out}, or choose it with output=."
    )


def _with_strides(value: Tensor) -> Tensor:
    return value if value.layout in (torch.strided, torch.jagged) else value.to_dense()


def check_parts(
    parts: tuple[Tensor, ...], likelihood: str, class_dim: int | None = None, rows: int | None = None
) -> None:
    """Raise a ValueError where the shape or the values in ``parts`` cannot mean what ``likelihood`` says.

    ``rows`` is the number of examples in the batch, as far as it is known.
    """
    value = parts[0]
    if likelihood in _WITH_CLASSES:
        dim = _dimension_of_classes(value, class_dim, rows)
        if likelihood == "logits":
            _check_logits(value, dim)
        else:
            _check_probabilities(value, dim)
    elif likelihood == "gaussian" and has_values(parts[1]) and (parts[1] < 0).any():
        raise ValueError(
            f"likelihood='gaussian' needs (mean, variance), and the second of the pair is negative in places (down to "
            f"{parts[1].min().item():.3g}). If it is the logarithm of the variance, pass output=lambda out: (out[0], "
            "out[1].exp())."
        )


def _dimension_of_classes(value: Tensor, class_dim: int | None, rows: int | None) -> int:
    shape = tuple(value.shape)
    if class_dim is None:
        if rows is not None and rows > 1 and shape == (rows,):
            raise ValueError(
                f"The output has the shape {shape}, one number for each example, and no dimension of classes. Of a "
                "yes/no question with one logit pass likelihood='binary_logits'; if these are the classes of a single "
                "example, class_dim=0."
            )
        if value.ndim > 3:
            raise ValueError(
                f"The output has the shape {shape}, and the classes of images are seldom in the last dimension. "
                "Say where they are: class_dim=1 for (N, C, H, W), class_dim=-1 for the last dimension."
            )
        class_dim = -1
    if not -value.ndim <= class_dim < value.ndim:
        raise ValueError(f"The output has the shape {shape}, which has no dimension {class_dim} for classes.")
    return class_dim


def _check_logits(value: Tensor, dim: int) -> None:
    shape = tuple(value.shape)
    if value.shape[dim] < 2:
        raise ValueError(
            f"likelihood='logits' needs a logit for each class; along dimension {dim} of the output, of shape {shape}, "
            f"there is {value.shape[dim]}, whose probability is always one. Of a yes/no question with one logit pass "
            "likelihood='binary_logits'."
        )
    # By chance two rows of logits have no sum that is one to the last digit.
    if has_values(value) and value.numel() >= 2 * value.shape[dim] and value.dtype in (torch.float32, torch.float64):
        exactly = 8 * torch.finfo(value.dtype).eps
        if ((value >= 0).all() & ((value.sum(dim) - 1).abs() <= exactly).all()).item():
            raise ValueError(
                "likelihood='logits' would take the softmax once more of what the model returned: every value is "
                f"positive, and along dimension {dim} they sum to one. Pass likelihood='probabilities'."
            )


def _check_probabilities(value: Tensor, dim: int) -> None:
    if not has_values(value):
        return
    sums = at_least_float32(value).sum(dim)
    wrong = ((value < 0).any() | ((sums - 1).abs() > _TOLERANCE).any()).item()
    if wrong:
        raise ValueError(
            f"likelihood='probabilities' needs probabilities that sum to one along dimension {dim}. The output, of "
            f"shape {tuple(value.shape)}, has values from {value.min().item():.3g} to {value.max().item():.3g}, with "
            f"sums from {sums.min().item():.3g} to {sums.max().item():.3g}. For unnormalised logits or logarithms of "
            "probabilities pass likelihood='logits', for classes in another dimension class_dim=; of one probability "
            "for each yes/no question return the logit and pass likelihood='binary_logits'."
        )


def probabilities(value: Tensor, likelihood: str, class_dim: int | None) -> Tensor:
    """The probabilities that ``value`` stands for, in float32 or better; values as they are."""
    if likelihood == "logits":
        return at_least_float32(value).softmax(-1 if class_dim is None else class_dim)
    if likelihood == "binary_logits":
        return at_least_float32(value).sigmoid()
    return value


def entropy(probabilities: Tensor, likelihood: str, class_dim: int | None) -> Tensor:
    """The entropy in nats of classes along ``class_dim``, or of each yes/no question."""
    if likelihood == "binary_logits":
        return torch.special.entr(probabilities) + torch.special.entr(1 - probabilities)
    return torch.special.entr(at_least_float32(probabilities)).sum(-1 if class_dim is None else class_dim)
