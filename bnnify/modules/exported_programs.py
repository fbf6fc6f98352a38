"""Programs without source (``torch.export``): their layers are gone, and what is left are operators on parameters."""

__all__ = ["operator_weights", "plain_view"]

import types

from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from ..torch_internals import argument_names, operator_name

_LINEAR = ("linear", "bilinear", "convolution", "_convolution", "conv1d", "conv2d", "conv3d")
_CELL = ("w_ih", "w_hh", "b_ih", "b_hh")
_WEIGHTS = {
    **dict.fromkeys((*_LINEAR, "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), ("weight", "bias")),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), ("params",)),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), _CELL),
    "matmul": ("other",),
    "mm": ("mat2",),
    "bmm": ("mat2",),
    "addmm": ("self", "mat2"),
    "baddbmm": ("self", "batch2"),
    "_trilinear": ("i2",),
}
"""The ATen operators that layers become, and the arguments in which these hand over their weights."""

_PRODUCTS = ("matmul", "mm", "bmm", "_trilinear")
_SHAPING = ("view", "_unsafe_view", "reshape", "permute", "transpose", "t", "squeeze", "unsqueeze", "expand", "clone")


def operator_weights(module: GraphModule) -> set[nn.Parameter]:
    """Find the parameters that linear operators, convolutions and recurrences in the graph take as their weights.

    A weight that is computed from parameters alone (a transpose, a cast, weight standardisation) counts as them.
    """
    weights = set()
    for node in module.graph.nodes:
        weights |= {parameter for argument in _weights(node) for parameter in _sources(module, argument)}
        weights |= {parameter for parameter in _sources(module, _added(node)) if parameter.ndim == 1}
    return weights


def plain_view(module: GraphModule, plain: type[GraphModule]) -> GraphModule:
    """Make a ``plain`` graph that shares what ``module`` holds, for torch to copy or to pickle as it does any graph."""
    view = plain.__new__(plain)
    view.__dict__ = {key: value for key, value in vars(module).items() if not isinstance(value, types.MethodType)}
    return view


def _weights(node: Node) -> list[Node]:
    """Find the nodes that the operator of ``node`` takes as its weights."""
    wanted = _WEIGHTS.get(_operator(node), ())
    if not wanted:
        return []
    arguments = dict(zip(argument_names(node.target), node.args, strict=False)) | node.kwargs
    found: list[Node] = []
    map_arg([arguments.get(name) for name in wanted], found.append)
    return found


def _added(node: Node) -> Node | None:
    """Find what ``node`` adds to a product, such as the bias of a decomposed layer; None if it does not."""
    if _operator(node) != "add":
        return None
    product, added = node.args[:2]
    while isinstance(product, Node) and _operator(product) in _SHAPING:
        product = product.args[0]
    return added if isinstance(product, Node) and _operator(product) in _PRODUCTS and isinstance(added, Node) else None


def _operator(node: Node) -> str:
    """Name the ATen operator that ``node`` calls; empty if it calls none."""
    return operator_name(node.target) if node.op == "call_function" else ""


def _sources(module: nn.Module, node: Node | None) -> set[nn.Parameter]:
    """Find the parameters from which alone ``node`` is computed; none if it also depends on an input or a layer."""
    parameters = set()
    waiting, seen = [] if node is None else [node], set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "get_attr":
            path, _, attribute = str(node.target).rpartition(".")
            parameter = module.get_submodule(path)._parameters.get(attribute)
            parameters |= set() if parameter is None else {parameter}
        elif node.op == "call_function" and _operator(node) not in _WEIGHTS:
            waiting += node.all_input_nodes
        else:
            return set()
    return parameters
