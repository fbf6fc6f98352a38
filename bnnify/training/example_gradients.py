"""Gradients of the log likelihood of single examples, whose labels are drawn from the model itself."""

__all__ = ["example_gradients", "scores"]

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from ..errors import ArgumentError
from ..prediction.batches import Arguments, called_with, choose, rows_of
from ..prediction.likelihood import Likelihood
from ..torch_internals import tree_flatten, tree_leaves, tree_map, tree_unflatten


def scores(model: nn.Module, inputs: Arguments, likelihood: Likelihood, output: Any) -> list[Tensor]:
    """∂ log p(y|x, w)/∂output with y drawn from p(y|x, w), for each tensor of real numbers in the output.

    By the chain rule the gradient of the log likelihood is that of the output weighted with these; so the labels are
    drawn for a whole batch at once, and the distribution need not be one that vmap understands.

    Raises:
        ArgumentError: The output cannot mean what the likelihood says, or is not finite; or not every tensor of input
            and output has an example in each row.
    """
    args, kwargs = inputs
    with torch.no_grad(), called_with(model, inputs):
        found = model(*args, **kwargs)
    with torch.enable_grad():
        found = tree_map(_as_leaf, choose(found, output))
        distribution = likelihood.distribution(found, rows_of(inputs))
        outputs = _floating(found)
        _check_rows([leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)], outputs)
        if not all(part.isfinite().all() for part in outputs):
            raise ArgumentError("The output of the model is NaN or infinite in places. Are the inputs finite?")
        with torch.no_grad():
            labels = distribution.sample()
        return list(torch.autograd.grad(distribution.log_prob(labels).sum(), outputs, materialize_grads=True))


def example_gradients(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    inputs: Arguments,
    of_output: list[Tensor],
    output: Any,
    chunk_size: int,
) -> Iterator[dict[str, Tensor]]:
    """Yield the gradients of the log likelihoods of single examples, chunk by chunk, in each an example for each row.

    ``of_output`` are those with respect to the output, as :func:`scores` gives them.

    Raises:
        ArgumentError: ``torch.func.vmap`` cannot do the model.
    """
    leaves, structure = tree_flatten(inputs)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def log_likelihood(values: dict[str, Any] | None, tensors: list[Tensor], weights: list[Tensor]) -> Tensor:
        """Up to a constant, of the examples in ``tensors``; by the model as it is if no ``values`` are given."""
        replaced = dict(zip(places, tensors, strict=True))
        args, kwargs = tree_unflatten([replaced.get(i, leaf) for i, leaf in enumerate(leaves)], structure)
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
            raise ArgumentError(
                f"Cannot take the gradients of single examples of the model ({type(model).__name__}) with "
                f"torch.func.vmap: {reason} Pass chunk_size=1, which goes without vmap, or use FisherStd.from_adam."
            ) from error


def _check_rows(inputs: list[Tensor], outputs: list[Tensor]) -> None:
    """Raise an ArgumentError unless the first dimension of all tensors has one size, the number of examples."""
    sizes = {tensor.shape[:1] for tensor in [*inputs, *outputs]}
    if len(sizes) > 1 or () in sizes:
        shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (inputs, outputs)]
        raise ArgumentError(
            "The Fisher information needs examples along the first dimension of every tensor in input and output; "
            f"their shapes are {shapes[0]} and {shapes[1]}. Give tensors that hold something else (an adjacency, a "
            "mask for all) to the model in another way, choose with output= what has a row for each example, or use "
            "FisherStd.from_adam."
        )


def _as_leaf(value: Any) -> Any:
    return value.detach().requires_grad_(value.is_floating_point()) if isinstance(value, Tensor) else value


def _floating(found: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
