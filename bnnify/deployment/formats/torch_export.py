"""Programs of ``torch.export``, executed by torch."""

__all__ = ["TorchExport"]

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.export import ExportedProgram

from .format import Format, Runner


class TorchExport(Format):
    """A graph that torch runs, compiles or hands on, without the code of the model."""

    name = "torch.export"
    ending = ".pt2"

    def check(self) -> None:
        return None

    def write(self, program: ExportedProgram, path: Path, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        program.example_inputs = None  # data of the user, which a stranger may read there
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # paths, too
        torch.export.save(program, path)

    def load(self, path: Path, outputs: Sequence[str]) -> Runner:
        with torch.device("cpu"):  # torch sets storages that it reads there in tensors on the default device
            module = torch.export.load(path).module()
        return lambda arguments: module(*arguments[0], **arguments[1])
