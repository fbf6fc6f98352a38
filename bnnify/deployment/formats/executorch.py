"""Programs of ExecuTorch, for phones and small devices, executed by its runtime on a CPU."""

__all__ = ["ExecuTorch"]

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from torch.export import ExportedProgram

from ...errors import MissingLibraryError
from ...prediction.batches import Arguments
from ...torch_internals import tree_leaves
from .format import Format, Runner


class ExecuTorch(Format):
    """One file with its weights, in the portable operators of ExecuTorch. It plans its memory for fixed sizes."""

    name = "executorch"
    ending = ".pte"
    takes_any_size = False

    def check(self) -> None:
        try:
            import executorch.exir
            import executorch.kernels.quantized  # which registers the operators of int8
            import executorch.runtime  # noqa: F401
        except ImportError as error:
            raise MissingLibraryError("The format 'executorch' needs executorch: pip install executorch.") from error

    def write(self, program: ExportedProgram, path: Path, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        from executorch.exir import to_edge_transform_and_lower

        with open(path, "wb") as file:
            to_edge_transform_and_lower(program).to_executorch().write_to_file(file)

    def load(self, path: Path, outputs: Sequence[str]) -> Runner:
        from executorch.runtime import Runtime

        method = Runtime.get().load_program(path).load_method("forward")

        def run(arguments: Arguments) -> dict[str, Tensor]:
            tensors = [leaf.contiguous() for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
            return dict(zip(outputs, (found.clone() for found in method.execute(tensors)), strict=True))

        return run
