"""Quantize networks from the posterior: 8-bit integers in the place of floats."""

__all__ = ["quantize"]

from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from ..errors import ArgumentError, ExportError, check_module, needing
from ..prediction.batches import batches_of, called_with
from .agreement import largest_difference, rounding
from .ensemble_graph import EnsembleGraph
from .freeze import Ensemble, freeze
from .trace import BATCH, Output, tensors_of


def quantize(
    bnn: nn.Module,
    calibration_loader: Any,
    *,
    num_samples: int = 8,
    weights_only: bool = False,
    output: Output = None,
    dynamic_shapes: Any = BATCH,
    antithetic: bool = False,
) -> EnsembleGraph:
    """Draw ``num_samples`` networks as one graph, with weights and layers in 8-bit integers, by torchao.

    Weights have a scale for each channel of each network. What a layer computes has a scale that all networks share,
    found from what all of them compute on the calibration data: they differ by what was drawn, not by how it is
    rounded. Logits stay floats. The graph computes in torch what the integers give; :func:`export` writes it.

    Args:
        bnn: A converted model, or what :func:`freeze` made of one; it stays as it is.
        calibration_loader: Some batches of typical inputs, as in :func:`~bnnify.prediction.predict`, read once. The
            first one is the example of what the graph is called with; a batch of one fixes the size of the batch.
        num_samples: K, the number of networks; of a frozen ensemble, its own. Default: ``8``.
        weights_only: Store weights as integers, and compute in floats, as transformers want it: a fourth of the size,
            at the speed of floats. Default: ``False``.
        output: Which part of a network's output, as in :func:`~bnnify.prediction.predict`. Default: all of it.
        dynamic_shapes: As in :meth:`Ensemble.as_graph`. Default: ``"batch"``.
        antithetic: Draw them in pairs, as in :func:`freeze`. Default: ``False``.

    Raises:
        ArgumentError: There is no calibration data, nothing in the network can be quantized, or it is not in float32.
        ExportError: ``torch.export`` does not take the network, or torchao changes what it computes before rounding.
        MissingLibraryError: torchao is not installed.

    Example::

        >>> bnn = bnnify.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)))
        >>> quantized = bnnify.quantize(bnn, [torch.randn(16, 3, 8, 8)], num_samples=4)
        >>> quantized(torch.randn(2, 3, 8, 8)).shape
        torch.Size([4, 2, 5])
    """
    check_module("quantize(bnn)", bnn)
    with needing("torchao", "bnnify.quantize"):
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        from .int8 import Int8Quantizer
    ensemble = bnn if isinstance(bnn, Ensemble) else freeze(bnn, num_samples, antithetic=antithetic)
    batches = batches_of(calibration_loader, ensemble)
    example = next(batches, None)
    if example is None:
        raise ArgumentError("The calibration loader gives no batch. Pass some batches of typical inputs.")
    floats = {tensor.dtype for tensor in (*ensemble.parameters(), *tensors_of(example)) if tensor.is_floating_point()}
    if others := floats - {torch.float32}:
        raise ArgumentError(f"torchao quantizes float32 alone, and there is {others.pop()}. Call float() on it first.")
    graph = EnsembleGraph([*ensemble.networks], example, output, dynamic_shapes)
    with torch.no_grad():
        exact = graph.outputs(*example[0], **example[1])
        graph.module = prepare_pt2e(graph.module, Int8Quantizer(activations=not weights_only))
        observed = graph.outputs(*example[0], **example[1])  # in floats still
        pairs = zip(tensors_of(observed), tensors_of(exact), strict=True)
        if any(largest_difference(*pair) > rounding(tensors_of(exact)) for pair in pairs):
            raise ExportError(
                f"torchao changes what {graph.name} computes before anything is rounded. It takes a batch "
                "normalisation into the convolution before it, which is wrong where another layer reads that "
                "convolution too, or where the normalisation is Bayesian and the convolution is not."
            )
        for args, kwargs in batches:
            with called_with(ensemble, (args, kwargs)):
                graph.outputs(*args, **kwargs)
        converted = convert_pt2e(graph.module)
        graph.module = GraphModule(converted, converted.graph)  # which has eval() again
        graph.rounded = exact, graph.outputs(*example[0], **example[1])
    return graph
