"""What models return, whatever structure holds it: its tensors, its shape, and a loss that all of it influences."""

__all__ = ["difference", "equal", "leaves", "loss", "structure", "tensors"]

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_DATA = (Tensor, nn.Module, type, str, bytes, int, float, complex, torch.dtype, torch.device, type(None))


def leaves(output: Any) -> list[Any]:
    """Every tensor and number of an output, in order: of pytrees, and of the attributes of plain objects in them."""
    return _flatten(output)[0]


def structure(output: Any) -> list[Any]:
    """What holds the leaves: comparable, and equal for two outputs of the same structure."""
    return _flatten(output)[1]


def difference(found: Any, expected: Any, tolerance: float = 0.0) -> str:
    """How one output differs from another, in words; empty where they are the same.

    Args:
        found: The output in question.
        expected: The one it should be.
        tolerance: Largest difference allowed, relative to the largest element of each tensor. Default: ``0.0``, which
            asks for the same bits (a NaN equals a NaN).
    """
    if structure(found) != structure(expected):
        return "the structure of the output is another"
    for place, (ours, theirs) in enumerate(zip(leaves(found), leaves(expected), strict=True)):
        if not isinstance(theirs, Tensor):
            if not isinstance(theirs, nn.Module) and ours != theirs:
                return f"leaf {place} is {ours!r} instead of {theirs!r}"
        elif ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return f"leaf {place} is a {_kind(ours)} instead of a {_kind(theirs)}"
        elif not _same(ours, theirs, tolerance):
            gap = (ours.double() - theirs.double()).abs().max().item()
            return f"leaf {place}, a {_kind(theirs)}, is off by {gap:.1e} (its largest is {_largest(theirs):.1e})"
    return ""


def loss(output: Any) -> Tensor:
    """A scalar of order one that every floating-point tensor of the output influences, each element differently.

    Raises:
        ValueError: No tensor of the output has a gradient.
    """
    terms = []
    for tensor in leaves(output):
        if isinstance(tensor, Tensor) and tensor.requires_grad and tensor.numel():
            flat = tensor.flatten()
            flat = flat[flat.detach().isfinite()].float()
            if not flat.numel():
                continue
            flat = flat / _largest(flat.detach())
            weights = torch.linspace(0.5, 1.5, flat.numel(), device=flat.device)
            terms.append((weights * flat).mean() + flat.square().mean())
    if not terms:
        raise ValueError("no tensor of the output has a gradient")
    return torch.stack(terms).sum()


def tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output, in order."""
    return [leaf for leaf in leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def equal(found: Any, expected: Any) -> bool:
    """Whether two outputs have the same structure and the same bits."""
    return not difference(found, expected)


def _flatten(output: Any) -> tuple[list[Any], list[Any]]:
    found, spec = pytree.tree_flatten(output)
    values: list[Any] = []
    shapes: list[Any] = [spec]
    for leaf in found:
        if isinstance(leaf, _DATA) or not hasattr(leaf, "__dict__"):
            values.append(leaf)
        else:  # an object that pytrees do not know, such as a cache of keys and values
            inner, shape = _flatten(dict(vars(leaf)))
            values += inner
            shapes += [type(leaf), *shape]
    return values, shapes


def _same(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    if tolerance == 0 or not expected.is_floating_point():
        both_nan = (found != found) & (expected != expected)
        return torch.equal(found, expected) or bool(((found == expected) | both_nan).all())
    return torch.allclose(found, expected, rtol=0.0, atol=tolerance * _largest(expected), equal_nan=True)


def _largest(tensor: Tensor) -> float:
    """The largest absolute value, or 1 for want of one that is finite and not zero."""
    sizes = tensor.detach().abs().double()
    sizes = sizes[sizes.isfinite()]
    return (sizes.max().item() if sizes.numel() else 0.0) or 1.0


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}".removeprefix("torch.")
