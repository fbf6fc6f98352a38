"""Networks as one graph, in which what does not depend on the sample stands once."""

__all__ = ["ORIGINAL", "EnsembleGraph"]

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from ..errors import ArgumentError, ArgumentTypeError, ExportError
from ..model import stacked
from ..prediction.batches import Arguments, called_with, choose
from ..prediction.eval_mode import evaluating
from ..torch_internals import tree_flatten, tree_map, tree_unflatten
from .agreement import largest_difference, rounding
from .trace import Named, Output, tensors_of, trace

ORIGINAL = "bnnify_original"
"""The key of a node's ``meta`` with the name that its copies for all networks have in common."""


class EnsembleGraph(nn.Module):
    """The graph of one network, in which each operation that depends on the sample stands once for each network.

    It computes what the networks compute one after the other in eval mode, by the same operations, on the device and in
    the dtype of the example. It can be copied and exported, but not pickled: pickle the networks, or write it with
    :func:`~bnnify.deployment.export`.

    Args:
        networks: Networks of one architecture, which share all but the samples.
        arguments: An example of what they are called with.
        output: Which part of their output, as in :func:`~bnnify.prediction.predict`. Default: all of it.
        dynamic_shapes: As in ``torch.export.export``, or ``"batch"``.

    Attributes:
        module: It takes tensors and returns the list of those that each network returns.
        name: The class of a network, for errors.
        signature: That of a network's forward.
        num_samples: K, the number of networks.
        rounded: Of a graph in int8 what each network returned for the example, in floats and then in int8; else None.

    Raises:
        ExportError: ``torch.export`` does not take the network, or it draws random numbers.
    """

    def __init__(
        self, networks: Sequence[nn.Module], arguments: Arguments, output: Output, dynamic_shapes: Any
    ) -> None:
        super().__init__()
        args, kwargs = arguments
        first = networks[0]
        self.name, self.num_samples = type(first).__name__, len(networks)
        self.rounded: tuple[list[Any], list[Any]] | None = None
        self.signature = inspect.signature(first.forward)
        chosen = _Chosen(first, output)
        with evaluating(nn.ModuleList(networks)):
            with torch.no_grad(), called_with(first, arguments):  # where it cannot, torch says here more clearly why
                expected = stacked([choose(network(*args, **kwargs), output) for network in networks])
            program = trace(chosen, arguments, dynamic_shapes, self.name)
        # Without operations in place, so that none changes what another network reads.
        program = program.run_decompositions({})
        self.module = _multiplied(program.module(), networks)
        self._inputs, self._outputs = program.call_spec.in_spec, program.call_spec.out_spec
        with torch.no_grad():
            found = self(*args, **kwargs)
        pairs = list(zip(tensors_of(found), tensors_of(expected), strict=True))
        if any(largest_difference(*pair) > rounding(tensors_of(expected)) for pair in pairs):
            raise ExportError(
                f"The graph of the first {self.name} does not compute what all of the networks do. "
                "Networks of one graph differ in what was drawn, and in nothing that was changed in one of them since."
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call every network; in the output each tensor of shape ``(...)`` has become ``(K, ...)``."""
        return stacked(self.outputs(*args, **kwargs))

    def outputs(self, *args: Any, **kwargs: Any) -> list[Any]:
        """The output of each network.

        Raises:
            ArgumentTypeError: The arguments are not given as those of the example were.
            ArgumentError: An input does not have a size that the example has fixed.
        """
        leaves, structure = tree_flatten((args, kwargs))
        if structure != self._inputs:
            raise ArgumentTypeError(
                "The graph of these networks takes its arguments as they were given in the example, positional or by "
                "name and nested as there."
            )
        try:
            found = self.module(*leaves)
        except AssertionError as error:
            raise ArgumentError(
                f"The inputs do not have a size that the example has fixed: {error}. Make the graph with an example of "
                "that size, or say in dynamic_shapes= which dimensions may have another one."
            ) from error
        return [tree_unflatten(each, self._outputs) for each in found]


class _Chosen(Named):
    """A network, of whose output a part is chosen."""

    def __init__(self, network: nn.Module, output: Output) -> None:
        super().__init__(inspect.signature(network.forward))
        self.network = network
        self._output = output

    def compute(self, *args: Any, **kwargs: Any) -> Any:
        return choose(self.network(*args, **kwargs), self._output)


def _multiplied(single: GraphModule, networks: Sequence[nn.Module]) -> GraphModule:
    """Copy the graph of one network, and each node in it that depends on the sample once for each network."""
    names = dict(networks[0].named_parameters(remove_duplicate=False))
    drawn = {name for name, p in names.items() if any(p is not each.get_parameter(name) for each in networks)}
    graph, values = Graph(), dict[str, Any]()
    copies: dict[Node, list[Node]] = {}  # of each node one for all networks, or one for each

    def of_network(number: int, value: Any) -> Any:
        return copies[value][number if len(copies[value]) > 1 else 0] if isinstance(value, Node) else value

    for node in single.graph.nodes:
        if node.op == "output":
            graph.output([tree_map(partial(of_network, number), node.args[0]) for number in range(len(networks))])
        elif node.op == "get_attr":
            name = node.target.removeprefix("network.")
            if name in drawn:
                named = {f"{name}_{number}": each.get_parameter(name) for number, each in enumerate(networks)}
            else:
                named = {name: _attribute(single, node.target)}
            values |= named
            copies[node] = [graph.create_node("get_attr", each) for each in named]
        else:
            if node.op == "call_module":
                values[node.target] = single.get_submodule(node.target)  # checks the sizes of the inputs
            count = max((len(copies[each]) for each in node.all_input_nodes), default=1)
            copies[node] = [graph.node_copy(node, partial(of_network, number)) for number in range(count)]
            for each in copies[node]:
                each.meta[ORIGINAL] = node.name
    return GraphModule(values, graph)


def _attribute(module: Any, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part)
    return module
