"""Which numbers of a graph of networks become 8-bit integers, as a quantizer of torchao."""

__all__ = ["Int8Quantizer"]

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import MinMaxObserver, PerChannelMinMaxObserver
from torchao.quantization.pt2e.quantizer import (
    QuantizationSpec,
    Quantizer,
    annotate_input_qspec_map,
    annotate_output_qspec,
)
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from ..errors import ArgumentError
from ..torch_internals import operator_name
from .ensemble_graph import ORIGINAL

_WEIGHTS = {
    "conv1d": (0, 1, 0),
    "conv2d": (0, 1, 0),
    "conv3d": (0, 1, 0),
    "linear": (0, 1, 0),
    "addmm": (1, 2, 1),
    "embedding": (None, 0, 0),
}
"""By operator: which of its arguments is the input and which the weight, and the dimension of the weight's channels."""

_FOLLOWING = {"relu", "relu6", "hardtanh"}
"""Operators that runtimes execute together with the layer before them."""


class Int8Quantizer(Quantizer):  # type: ignore[misc]  # torchao has no types
    """Stores weights as 8-bit integers with a scale for each channel, and computes layers in 8-bit integers.

    The inputs of layers and sums, and the outputs that reach another one of them, have a scale and a zero point each,
    which all networks share: where two networks differ, the drawn weights do it.

    Args:
        activations: Whether layers are computed in integers; otherwise weights alone are stored as such.
    """

    def __init__(self, activations: bool) -> None:
        super().__init__()
        # Unsigned, because onnxruntime fuses a layer and the ReLU after it only so.
        kwargs: dict[str, Any] = {"quant_min": 0, "quant_max": 255, "qscheme": torch.per_tensor_affine}
        self._activation = QuantizationSpec(torch.uint8, MinMaxObserver, **kwargs) if activations else None

    def annotate(self, model: GraphModule) -> GraphModule:
        nodes = list(model.graph.nodes)
        varying = _reached_from((node for node in nodes if node.op == "placeholder"), nodes)
        layers = []
        for node in nodes:
            if weight := _weight(node, varying):
                annotate_input_qspec_map(node, *weight)
            inputs = _inputs(node, varying) if self._activation else []
            for each in inputs:
                annotate_input_qspec_map(node, each, self._activation)
            layers += [node] if inputs else []
        # What reaches no other layer, such as logits, would lose digits and gain nothing.
        leads_on = _leading_to(layers, nodes)
        for node in layers:
            users = list(node.users)
            last = users[0] if len(users) == 1 and operator_name(users[0].target) in _FOLLOWING else node
            if last in leads_on:
                annotate_output_qspec(last, self._activation)
        return model

    def prepare_obs_or_fq_callback(self, model: GraphModule, edge_or_node_to_obs_or_fq: dict[Any, Any]) -> None:
        """Let the copies of one place in the networks share its observer."""
        shared: dict[Any, Any] = {}
        for place, observer in edge_or_node_to_obs_or_fq.items():
            if isinstance(observer, MinMaxObserver):
                names = tuple(_original(node) for node in (place if isinstance(place, tuple) else (place,)))
                edge_or_node_to_obs_or_fq[place] = shared.setdefault(names, observer)

    def validate(self, model: GraphModule) -> None:
        if not any(Q_ANNOTATION_KEY in node.meta for node in model.graph.nodes):
            raise ArgumentError("Nothing can be quantized: the network has no convolution, linear layer or embedding.")


def _weight(node: Node, varying: set[Node]) -> tuple[Node, QuantizationSpec] | None:
    """The weight of a layer, if it does not depend on the inputs, and how it is quantized."""
    if operator_name(node.target) not in _WEIGHTS:
        return None
    _, position, channels = _WEIGHTS[operator_name(node.target)]
    weight = node.args[position]
    if not isinstance(weight, Node) or weight in varying:
        return None
    # Unsigned: where x86 lacks VNNI, onnxruntime's sums of unsigned inputs times signed weights saturate.
    kwargs: dict[str, Any] = {"quant_min": 0, "quant_max": 255, "qscheme": torch.per_channel_symmetric}
    return weight, QuantizationSpec(torch.uint8, PerChannelMinMaxObserver, ch_axis=channels, **kwargs)


def _inputs(node: Node, varying: set[Node]) -> list[Node]:
    """The inputs of a layer with a weight, or of a sum, that are computed in integers."""
    if _weight(node, varying):
        position = _WEIGHTS[operator_name(node.target)][0]
        found = [] if position is None else [node.args[position]]
    elif operator_name(node.target) == "add" and len(node.args) == 2:
        found = list(node.args)
    else:
        return []
    inputs = [each for each in found if isinstance(each, Node) and each in varying and _is_float(each)]
    return inputs if len(inputs) == len(found) else []


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _reached_from(sources: Iterable[Node], nodes: list[Node]) -> set[Node]:
    found = set(sources)
    for node in nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _leading_to(targets: list[Node], nodes: list[Node]) -> set[Node]:
    """The nodes on which a target depends, itself aside."""
    found, wanted = set[Node](), set(targets)
    for node in reversed(nodes):
        if any(user in wanted or user in found for user in node.users):
            found.add(node)
    return found


def _original(node: Node) -> str:
    return node.meta.get(ORIGINAL, node.name)
