"""Write networks from the posterior to a file that another runtime executes, and check it there."""

__all__ = ["Export", "export"]

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ArgumentError, check_module, check_path
from ..model import BayesianModel
from ..prediction.batches import Arguments, as_arguments, called_with, choose, rows_of
from ..prediction.devices import devices_of
from ..prediction.eval_mode import evaluating
from ..prediction.known_likelihoods import LikelihoodLike, as_likelihood
from .agreement import largest_difference, rounding
from .ensemble_graph import EnsembleGraph
from .formats import format_for
from .freeze import Ensemble, freeze
from .local_noise import LocallyNoisyNetwork
from .networks import FrozenNetworks, Networks
from .noisy import NoisyNetwork
from .served import NETWORKS, Served, named_outputs
from .trace import BATCH, Output, dynamic_dimensions, tensors_of, trace
from .written import Trial, fresh, write_checked


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        path: The file.
        format: The name of its format.
        inputs: The names of its inputs, which are those of the model's forward.
        outputs: The names of its outputs.
        dynamic: The dimensions of each input that may have another size than in the example, for those with any.
        num_samples: The number of networks.
        nbytes: The size of the file.
        num_inputs: On how many inputs it was compared: 3, or fewer if the networks do not take the other values or the
            longer batch that were made from the example, such as indices in disorder.
        max_difference: The largest difference between its outputs and those of the networks in eager PyTorch.
    """

    path: Path
    format: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: dict[str, tuple[int, ...]]
    num_samples: int
    nbytes: int
    num_inputs: int
    max_difference: float

    def __str__(self) -> str:
        sizes = [f"{name} (any size of dimension {', '.join(map(str, dims))})" for name, dims in self.dynamic.items()]
        fixed = [name for name in self.inputs if name not in self.dynamic]
        return (
            f"{self.path}: {self.format}, {self.nbytes / 1e6:.1f} MB, {self.num_samples} networks; inputs "
            f"{', '.join(sizes + fixed)}; outputs {', '.join(self.outputs)}; run and compared on "
            f"{self.num_inputs} input{'s' * (self.num_inputs > 1)}: the largest difference is {self.max_difference:.1e}"
        )


def export(
    bnn: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    num_samples: int = 8,
    likelihood: LikelihoodLike | None = None,
    outputs: Sequence[str] | None = None,
    output: Output = None,
    class_dim: int | None = None,
    dynamic_shapes: Any = BATCH,
    format: str | None = None,
    noise: str | None = None,
    antithetic: bool = False,
) -> Export:
    """Draw ``num_samples`` networks, write them to a file as one graph, run that, and compare it with the networks.

    What does not depend on the sample is computed once and stands once in the file. Nothing in it is random: they are
    the networks that :func:`freeze` draws under the same seed, in eval mode.

    =====================  ======  ================================================================================
    ``format``             ending  executed by
    =====================  ======  ================================================================================
    ``"onnx"``             .onnx   onnxruntime, and whatever reads ONNX; needs the extra ``deploy``
    ``"torch.export"``     .pt2    ``torch.export.load(path).module()``
    ``"aot_inductor"``     .pt2    torch without Python code, compiled for the device of the model; needs a C++ compiler
    ``"executorch"``       .pte    ExecuTorch, on phones and small devices; needs executorch, and fixes the batch
    =====================  ======  ================================================================================

    Args:
        bnn: A converted model, or what :func:`freeze` or :func:`quantize` made of one; it stays as it is.
        path: The file, which is there whole and checked, or not at all.
        example_inputs: What the model is called with: a tensor, a tuple of arguments, or a mapping of keyword
            arguments, as in :func:`~bnnify.prediction.predict`. A batch of one fixes the size of the batch.
        num_samples: K, the number of networks; of a frozen ensemble, its own. Default: ``8``.
        likelihood: What an output means, as in :func:`~bnnify.prediction.predict`. Default: ``None``: the file returns
            ``networks``, or if ``outputs`` asks for averages, those of values.
        outputs: Names of what the file returns: attributes of a :class:`~bnnify.prediction.Prediction`, such as
            ``"mean"``, and ``"networks"``, what every network returned, of shape (K, ...). Default: of classes mean,
            predictive entropy and mutual information, of values the mean and the standard deviations.
        output: Which part of a network's output, as in :func:`~bnnify.prediction.predict`. Default: all of it.
        class_dim: The dimension of the classes, as in :func:`~bnnify.prediction.predict`. Default: the last one.
        dynamic_shapes: Which dimensions may have another size than in the example: ``"batch"``, the first one as far
            as the model allows it, or what ``torch.export.export`` takes; None for none. Default: ``"batch"``.
        format: See above. Default: ``None``, the first one with the ending of ``path``.
        noise: ``"input"`` for one network, whose noise ε is drawn by whoever calls it. μ and σ stand in the file, and
            for each Bayesian weight it has one more input, a tensor of its shape: in ONNX of the name
            ``fc.weight_noise``, in torch in a mapping ``noise`` by the names of the weights. ``"local"`` puts the noise
            on the output of each linear or convolutional layer instead (local reparameterization): all weights are
            constants, and the inputs, such as ``fc.output_noise``, have the shapes of these outputs. Default: ``None``.
        antithetic: Draw them in pairs, as in :func:`freeze`. Default: ``False``.

    Raises:
        ArgumentError: An option is unknown, or the example is not what the model takes.
        ExportError: The model cannot be exported, which the message explains; or the file computes something else than
            the networks, and was not kept.
        CheckpointError: The file cannot be written.
        MissingLibraryError: A library or a compiler is missing.

    Example::

        >>> bnn = bnnify.convert(nn.Linear(4, 3))
        >>> bnnify.export(bnn, "model.pt2", torch.randn(2, 4), likelihood="logits").outputs
        ('mean', 'predictive_entropy', 'mutual_information')
    """
    check_module("export(bnn)", bnn)
    check_path("export(path)", path)
    if noise not in (None, "input", "local"):
        raise ArgumentError(f"export(noise) must be 'input', 'local' or None, not {noise!r}.")
    if noise is not None and isinstance(bnn, (Ensemble, EnsembleGraph)):
        raise ArgumentError("Frozen networks have no noise that could be an input. Export the converted model.")
    form = format_for(path, format)
    form.check()
    meaning = as_likelihood("values" if likelihood is None else likelihood, class_dim)
    dynamic_shapes = None if dynamic_shapes == BATCH and not form.takes_any_size else dynamic_shapes
    wanted = (NETWORKS,) if outputs is None and likelihood is None else outputs
    arguments = as_arguments(example_inputs)
    if output is not None and isinstance(bnn, EnsembleGraph):
        raise ArgumentError("Which part of the output the graph of the networks returns was chosen when it was made.")
    if noise is None and not isinstance(bnn, (Ensemble, EnsembleGraph)):
        bnn = freeze(bnn, num_samples, antithetic=antithetic)
    _check_devices(bnn, arguments)
    with evaluating(bnn):
        networks = _networks(bnn, arguments, output, dynamic_shapes, noise)
        integers = {}
        if networks.rounded is not None:  # no runtime rounds to integers where another one does
            exact, rounded = (named_outputs(found, meaning, wanted) for found in networks.rounded)
            integers = {name: 2 * largest_difference(rounded[name], exact[name]) for name in exact}

        def trial(arguments: Arguments, seed: int) -> Trial:
            args, kwargs = arguments[0], {**arguments[1], **networks.draw(seed, arguments)}
            with torch.no_grad(), called_with(networks, arguments):
                found = networks.expected(*args, **kwargs)
                expected = named_outputs(found, meaning, wanted, rows_of(arguments))
            floats = rounding(tensors_of(found))
            return Trial((args, kwargs), expected, {name: max(floats, integers.get(name, 0.0)) for name in expected})

        example = trial(arguments, 0)
        program = trace(Served(networks, meaning, wanted), example.arguments, dynamic_shapes, networks.name)
        dynamic = dynamic_dimensions(program)
        longer = {id(leaf): 2 for leaf, dims in zip(tensors_of(arguments), dynamic.values(), strict=False) if 0 in dims}
        others = fresh(arguments, 1, {}), fresh(arguments, 2, longer if dynamic_shapes == BATCH else {})
        trials = [example]
        for seed, each in enumerate(others, 1):
            with suppress(Exception):  # the networks may not take it; num_inputs tells
                trials.append(trial(each, seed))
        inputs = [*dynamic][: len(dynamic) - len(networks.noise_names)]
        inputs += [f"{name}_noise" for name in networks.noise_names]
        nbytes, largest = write_checked(program, form, path, inputs, trials)
    return Export(
        path=Path(path),
        format=form.name,
        inputs=tuple(inputs),
        outputs=tuple(example.expected),
        dynamic={name: dims for name, dims in zip(inputs, dynamic.values(), strict=True) if dims},
        num_samples=networks.num_samples,
        nbytes=nbytes,
        num_inputs=len(trials),
        max_difference=largest,
    )


def _networks(bnn: nn.Module, arguments: Arguments, output: Output, dynamic_shapes: Any, noise: str | None) -> Networks:
    if isinstance(bnn, EnsembleGraph):
        return FrozenNetworks(bnn, bnn.outputs)
    if isinstance(bnn, Ensemble):
        plain = [*bnn.networks]
        graph = EnsembleGraph(plain, arguments, output, dynamic_shapes)
        return FrozenNetworks(graph, lambda *args, **kwargs: [choose(each(*args, **kwargs), output) for each in plain])
    root = bnn.module if isinstance(bnn, BayesianModel) else bnn
    return NoisyNetwork(root, output) if noise == "input" else LocallyNoisyNetwork(root, arguments, output)


def _check_devices(bnn: nn.Module, arguments: Arguments) -> None:
    devices = devices_of(bnn)
    elsewhere = [tensor.device for tensor in tensors_of(arguments) if devices and tensor.device not in devices]
    if elsewhere:
        raise ArgumentError(f"The example inputs are on {elsewhere[0]}, and the model is on {devices[0]}. Move one.")
