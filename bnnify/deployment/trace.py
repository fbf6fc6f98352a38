"""Export a module as a graph by ``torch.export``."""

__all__ = [
    "BATCH",
    "Named",
    "Output",
    "dynamic_dimensions",
    "first_line",
    "tensors_of",
    "trace",
]

import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from ..errors import ExportError
from ..prediction.batches import Arguments, rows_of
from ..torch_internals import draws_random_numbers, operator_name, size_conditions, tree_leaves, tree_map

BATCH = "batch"
"""The dynamic shapes in which the first dimension of every input may have any size, as far as the model allows."""


_SAME_SIZE = re.compile(r"L\S+\.size\(\)\[\d+\] == L\S+\.size\(\)\[\d+\]")
"""A condition on sizes that whatever runs a graph meets or reports."""

Output: TypeAlias = str | int | Callable[[Any], Any] | None
"""Which part of a model's output, as in :func:`~bnnify.prediction.batches.choose`."""


class Named(nn.Module):
    """A module whose inputs have the names of another one's, which an exported program keeps.

    Args:
        signature: That of the other one's forward.

    Attributes:
        without_batch: The names of arguments that have no dimension for examples.
    """

    without_batch: Sequence[str] = ()

    def __init__(self, signature: inspect.Signature) -> None:
        super().__init__()
        self.signature = signature

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self.compute(*args, **kwargs)

        forward.__signature__ = signature  # type: ignore[attr-defined]
        self.forward = forward

    def compute(self, *args: Any, **kwargs: Any) -> Any:
        """The forward."""
        raise NotImplementedError


def trace(module: Named, arguments: Arguments, dynamic_shapes: Any, name: str) -> ExportedProgram:
    """Export ``module``, called with ``arguments``, and refuse it if it draws random numbers.

    Args:
        module: In eval mode.
        arguments: An example of its arguments.
        dynamic_shapes: As in ``torch.export.export``, or ``"batch"``: any size of the first dimension of each tensor
            with a batch, unless its code depends on that size, which no file could check.
        name: That of the model, for errors.

    Raises:
        ExportError: ``torch.export`` does not take it, or it draws random numbers.
    """
    # A view into a larger batch would fix the size of the batch by its strides.
    arguments = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, arguments)
    program = _exported(module, arguments, _spelled_out(module, arguments, dynamic_shapes), name)
    if dynamic_shapes == BATCH and not all(map(_SAME_SIZE.fullmatch, size_conditions(program))):
        program = _exported(module, arguments, None, name)
    if found := sorted(set(_random_operators(program.graph_module))):
        raise ExportError(
            f"{name} draws random numbers in its forward in eval mode ({', '.join(found)}), which no two runtimes draw "
            "alike, and some draw the same again in each session. Take that out of its forward, or pass the noise to "
            "it as an input."
        )
    return program


def _spelled_out(module: Named, arguments: Arguments, dynamic_shapes: Any) -> Any:
    """What ``torch.export.export`` takes for ``dynamic_shapes``."""
    bound = module.signature.bind(*arguments[0], **arguments[1]).arguments
    fixed = {name: tree_map(lambda leaf: None, bound[name]) for name in module.without_batch}
    if isinstance(dynamic_shapes, Mapping):
        return {**dynamic_shapes, **fixed}
    if dynamic_shapes != BATCH:
        return dynamic_shapes
    rows = rows_of(arguments)

    def first_dimension(leaf: Any) -> Any:
        return {0: Dim.AUTO} if isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == rows else None

    return {name: tree_map(first_dimension, value) for name, value in bound.items()} | fixed


def _exported(module: Named, arguments: Arguments, dynamic_shapes: Any, name: str) -> ExportedProgram:
    args, kwargs = arguments
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # It takes weights that a forward computes and keeps, as a recurrent layer does, for forgotten buffers.
            warnings.filterwarnings("ignore", "The tensor attribute")
            return torch.export.export(module, args, dict(kwargs), dynamic_shapes=dynamic_shapes)
    except Exception as error:
        raise ExportError(
            f"{name} cannot be exported: torch.export says: {first_line(error)} The forward must be a graph without "
            "decisions that depend on values, and its output tensors, or with output= a part of it that is."
        ) from error


def tensors_of(values: Any) -> list[Tensor]:
    """The tensors in nested containers, such as arguments, in the order in which a program takes or returns them."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def dynamic_dimensions(program: ExportedProgram) -> dict[str, tuple[int, ...]]:
    """The dimensions that may have any size of each input tensor of a program, by its name."""
    from torch.fx.experimental.symbolic_shapes import is_concrete_int  # takes a second, and brings sympy

    found = {}
    for node in program.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if node.name in program.graph_signature.user_inputs and isinstance(value, Tensor):
            found[node.name] = tuple(dim for dim, size in enumerate(value.shape) if not is_concrete_int(size))
    return found


def _random_operators(module: nn.Module) -> Iterator[str]:
    """Name the operators that draw random numbers in the graphs of ``module`` and of its submodules."""
    for part in module.modules():
        for node in part.graph.nodes if isinstance(part, GraphModule) else ():
            if operator_name(node.target) and draws_random_numbers(node.target, node.args, node.kwargs):
                given = node.normalized_arguments(part, normalize_to_only_use_kwargs=True).kwargs
                if given.get("p") != 0:  # at zero what is drawn has no effect
                    yield operator_name(node.target)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, as a sentence."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if line.endswith((".", "!", "?")) else f"{line}."
