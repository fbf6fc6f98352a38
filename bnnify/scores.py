"""Scores: gradients of the log likelihood of single examples, whose labels are drawn from the model itself."""

__all__ = ["Inputs", "Predictive", "example_gradients", "predictive_distribution", "scores"]

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, Normal
from torch.func import functional_call, grad, vmap
from torch.utils import _pytree as pytree

from .batches import choose
from .errors import ConversionError
from .likelihood import pair_of
from .posterior import at_least_float32

Predictive: TypeAlias = Literal["logits", "binary_logits", "gaussian"] | Callable[[Any], Distribution]
"""What the output of a model means: see :func:`predictive_distribution`."""

Inputs: TypeAlias = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional and keyword arguments of a model."""


def predictive_distribution(found: Any, likelihood: Predictive) -> Distribution:
    """p(y|x, w), of which ``found`` is the part of a model's output that tells it.

    Raises:
        ValueError: The likelihood is unknown.
    """
    if callable(likelihood):
        return likelihood(found)
    if likelihood == "logits":
        return Categorical(logits=at_least_float32(found))
    if likelihood == "binary_logits":
        return Bernoulli(logits=at_least_float32(found))
    if likelihood == "gaussian":
        mean, variance = pair_of(found)
        return Normal(at_least_float32(mean), at_least_float32(variance).sqrt())
    raise ValueError(
        f"Unknown likelihood {likelihood!r}: known are 'logits', 'binary_logits', 'gaussian', and a function of the "
        "output that returns a torch.distributions.Distribution."
    )


def scores(model: nn.Module, inputs: Inputs, likelihood: Predictive, output: Any) -> list[Tensor]:
    """∂ log p(y|x, w)/∂output with y drawn from p(y|x, w), for each tensor of the output.

    By the chain rule the gradient of the log likelihood is that of the output weighted with these; so the labels are
    drawn for a whole batch at once, and the distribution need not be one that vmap understands.
    """
    args, kwargs = inputs
    with torch.no_grad():
        found = choose(model(*args, **kwargs), output)
    with torch.enable_grad():
        found = pytree.tree_map_only(Tensor, _as_leaf, found)
        distribution = predictive_distribution(found, likelihood)
        with torch.no_grad():
            labels = distribution.sample()
        return list(torch.autograd.grad(distribution.log_prob(labels).sum(), _floating(found), materialize_grads=True))


def example_gradients(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    inputs: Inputs,
    of_output: list[Tensor],
    output: Any,
    chunk_size: int,
) -> Iterator[dict[str, Tensor]]:
    """The gradients of the log likelihoods of single examples, chunk by chunk: in each an example for each row.

    ``of_output`` are those with respect to the output, as :func:`scores` gives them.

    Raises:
        ConversionError: ``torch.func.vmap`` cannot do the model.
    """
    leaves, structure = pytree.tree_flatten(inputs)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def log_likelihood(values: dict[str, Any] | None, tensors: list[Tensor], weights: list[Tensor]) -> Tensor:
        """Up to a constant, of the examples in ``tensors``; by the model as it is where no ``values`` are given."""
        replaced = dict(zip(places, tensors, strict=True))
        args, kwargs = pytree.tree_unflatten([replaced.get(i, leaf) for i, leaf in enumerate(leaves)], structure)
        found = model(*args, **kwargs) if values is None else functional_call(model, values, args, dict(kwargs))
        pairs = zip(weights, _floating(choose(found, output)), strict=True)
        return torch.stack([(weight * part).sum() for weight, part in pairs]).sum()

    def of_one(values: dict[str, Any], tensors: list[Tensor], weights: list[Tensor]) -> Tensor:
        return log_likelihood(values, [t.unsqueeze(0) for t in tensors], [w.unsqueeze(0) for w in weights])

    gradients = vmap(grad(of_one), in_dims=(None, 0, 0), randomness="different")
    values = {name: parameter.detach() for name, parameter in parameters.items()}
    for start in range(0, len(of_output[0]), chunk_size):
        tensors = [leaves[place][start : start + chunk_size] for place in places]
        weights = [score[start : start + chunk_size] for score in of_output]
        if chunk_size == 1:
            with torch.enable_grad():
                total = log_likelihood(None, tensors, weights)
                found = torch.autograd.grad(total, list(parameters.values()), materialize_grads=True)
            yield {name: gradient.unsqueeze(0) for name, gradient in zip(parameters, found, strict=True)}
            continue
        try:
            yield gradients(values, tensors, weights)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ConversionError(
                f"Cannot take the gradients of single examples of the model ({type(model).__name__}) with "
                f"torch.func.vmap: {reason} Pass chunk_size=1, which goes without vmap, or use FisherStd.from_adam."
            ) from error


def _as_leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.is_floating_point())


def _floating(found: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
