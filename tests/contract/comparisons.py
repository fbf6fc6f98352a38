"""How promises are found broken: comparisons of models, tensors and gradients that raise with what differs."""

__all__ = [
    "Failure",
    "NotApplicable",
    "copy_of",
    "described",
    "flags_of",
    "identity_of",
    "not_applicable_if_the_original",
    "refute",
    "refute_gradient",
    "refute_same",
    "refute_state",
]

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import bnnify
from bnnify.modules.computed_weights import detached_hook_weights

from . import outputs
from .case import Gradient, Subject


class Failure(Exception):
    """The converted model breaks a promise."""


class NotApplicable(Exception):
    """The original does not do what the check asks of the converted model."""


def refute(failure: str) -> None:
    if failure:
        raise Failure(failure)


def refute_gradient(name: str, got: Gradient, elements: Tensor, wanted: Gradient, error: Tensor | float = 0.0) -> None:
    refute(f"the gradient of {name} is not finite" if wanted.finite and not got.finite else "")
    if wanted.finite:
        gap = ((got.elements.double() - elements.double()).abs() - error).max().item()
        refute(f"the gradient of {name} is off by {gap:.1e}" if gap > 1e-3 * wanted.largest else "")


def refute_same(subject: Subject, other: bnnify.BayesianModel) -> None:
    """Raise unless ``other`` has the tensors, the posterior mean and the draws of the converted model."""
    refute_state(other.module, subject.bnn.module)
    with torch.no_grad():
        refute(outputs.difference(subject.run(other.module), subject.reference))
        drawn = subject.run(other)
    refute(outputs.difference(drawn, subject.drawn))
    refute("" if outputs.difference(drawn[0], subject.reference) else "it draws no more")


def refute_state(model: nn.Module, expected: nn.Module) -> None:
    ours, theirs = model.state_dict(), expected.state_dict()
    refute("" if list(ours) == list(theirs) else "the state_dict has other keys")
    for name, tensor in theirs.items():
        if isinstance(tensor, Tensor):
            refute("" if not outputs.difference(ours[name], tensor) else f"{name} has other values")


def identity_of(model: nn.Module) -> list[Any]:
    """The classes of a model's modules, and its parameters with how often each was written to."""
    written = [(name, id(parameter), parameter._version) for name, parameter in model.named_parameters()]
    return [[type(module) for module in model.modules()], written]


def copy_of(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model, detached_hook_weights(model))


def flags_of(tensor: Any) -> Any:
    return (tensor.dtype, tensor.device, tensor.requires_grad) if isinstance(tensor, Tensor) else type(tensor)


@contextlib.contextmanager
def not_applicable_if_the_original(verb: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise NotApplicable(f"neither {verb} the original: {described(error)}") from None


def described(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, Failure) else f"{type(error).__name__}: {text}"
