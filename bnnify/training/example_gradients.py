"""Scores: gradients of the log likelihood of single examples, whose labels are drawn from the model itself."""

__all__ = ["Predictive", "example_gradients", "predictive_distribution", "scores"]

from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, Normal
from torch.func import functional_call, grad, vmap
from torch.utils import _pytree as pytree

from ..checks import describe
from ..distributions.gaussian import at_least_float32
from ..errors import ConversionError
from ..prediction.batches import Arguments, called_with, choose, rows_of
from ..prediction.likelihood import check_likelihood, check_parts, parts_of

Predictive: TypeAlias = Literal["logits", "binary_logits", "gaussian"] | Callable[[Any], Distribution]
"""What the output of a model means: see :func:`predictive_distribution`."""


def predictive_distribution(
    found: Any, likelihood: Predictive, class_dim: int | None = None, rows: int | None = None
) -> Distribution:
    """p(y|x, w), of which ``found`` is the part of a model's output that tells it.

    ``rows`` is the number of examples in the batch, as far as it is known. Values that are no number are let through,
    so that who compares likelihoods can see how bad they are.

    Raises:
        ValueError: The likelihood is unknown, or the output cannot mean that.
        TypeError: Likewise, because of its type.
    """
    if callable(likelihood):
        distribution = likelihood(found)
        if not isinstance(distribution, Distribution):
            raise TypeError(
                "likelihood= must be a function of the output that returns a torch.distributions.Distribution, not "
                f"{describe(distribution)}."
            )
        return distribution
    if likelihood not in ("logits", "binary_logits", "gaussian"):
        raise ValueError(
            f"Unknown likelihood {likelihood!r}: known are 'logits', 'binary_logits', 'gaussian', and a function of "
            "the output that returns a torch.distributions.Distribution."
        )
    check_likelihood(likelihood, class_dim)
    parts = parts_of(found, likelihood)
    check_parts(parts, likelihood, class_dim, rows)
    first, *others = map(at_least_float32, parts)
    if likelihood == "logits":
        return Categorical(logits=first if class_dim is None else first.movedim(class_dim, -1), validate_args=False)
    if likelihood == "binary_logits":
        return Bernoulli(logits=first, validate_args=False)
    return Normal(first, others[0].sqrt(), validate_args=False)


def scores(
    model: nn.Module, inputs: Arguments, likelihood: Predictive, output: Any, class_dim: int | None = None
) -> list[Tensor]:
    """∂ log p(y|x, w)/∂output with y drawn from p(y|x, w), for each tensor of the output.

    By the chain rule the gradient of the log likelihood is that of the output weighted with these; so the labels are
    drawn for a whole batch at once, and the distribution need not be one that vmap understands.

    Raises:
        ValueError: The output cannot mean what the likelihood says, or is not finite.
        ConversionError: Not every tensor of input and output has an example in each row.
    """
    args, kwargs = inputs
    with torch.no_grad(), called_with(model, inputs):
        found = model(*args, **kwargs)
    with torch.enable_grad():
        found = pytree.tree_map_only(Tensor, _as_leaf, choose(found, output))
        distribution = predictive_distribution(found, likelihood, class_dim, rows_of(inputs))
        outputs = _floating(found)
        _check_rows(inputs, outputs)
        if not all(part.isfinite().all() for part in outputs):
            raise ValueError("The output of the model is NaN or infinite in places. Are the inputs finite?")
        with torch.no_grad():
            labels = distribution.sample()
        return list(torch.autograd.grad(distribution.log_prob(labels).sum(), outputs, materialize_grads=True))


def _check_rows(inputs: Arguments, outputs: list[Tensor]) -> None:
    """Raise a ConversionError unless the first dimension of all tensors has one size, the number of examples."""
    given = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    sizes = {tensor.shape[:1] for tensor in [*given, *outputs]}
    if len(sizes) > 1 or () in sizes:
        shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (given, outputs)]
        raise ConversionError(
            "The Fisher information needs examples along the first dimension of every tensor in input and output; "
            f"their shapes are {shapes[0]} and {shapes[1]}. Give tensors that hold something else (an adjacency, a "
            "mask for all) to the model in another way, choose with output= what has a row for each example, or use "
            "FisherStd.from_adam."
        )


def example_gradients(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    inputs: Arguments,
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
