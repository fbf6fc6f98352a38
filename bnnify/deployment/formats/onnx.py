"""ONNX, executed by onnxruntime."""

__all__ = ["Onnx"]

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ...errors import ArgumentError, needing
from ...prediction.batches import Arguments
from ...torch_internals import tree_leaves
from .format import Format, Runner

_LIMIT = 2**31
"""The bytes of the largest file that protobuf reads."""


class Onnx(Format):
    """One file with its weights, which also runtimes that are not on Python load."""

    name = "onnx"
    ending = ".onnx"

    def check(self) -> None:
        with needing("onnx onnxruntime onnxscript", "The format 'onnx'"):
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401

    def write(self, program: ExportedProgram, path: Path, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        nbytes = sum(tensor.nbytes for tensor in (*program.state_dict.values(), *program.constants.values()))
        if nbytes >= _LIMIT:
            raise ArgumentError(
                f"The weights take {nbytes / 2**30:.1f} GiB, and an ONNX file holds at most 2 GiB. Take fewer "
                "networks, or write a .pt2 file."
            )
        with torch.no_grad():
            written: Any = torch.onnx.export(program, (), dynamo=True, verbose=False, input_names=inputs)
        graph = written.model.graph
        for value in (value for node in graph for value in node.outputs if value.name in (*inputs, *outputs)):
            value.name = f"{value.name}_inside"
        for node in graph:
            node.metadata_props.clear()  # paths and lines of code, which of small files are a good part
        for value, name in zip(graph.outputs, outputs, strict=True):
            value.name = name
        written.save(path, external_data=False)

    def load(self, path: Path, outputs: Sequence[str]) -> Runner:
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        inputs = [each.name for each in session.get_inputs()]

        def run(arguments: Arguments) -> dict[str, Tensor]:
            tensors = (leaf.cpu().numpy() for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor))
            found = session.run(outputs, dict(zip(inputs, tensors, strict=True)))
            return dict(zip(outputs, map(torch.from_numpy, found), strict=True))

        return run
