"""Packages of AOTInductor: machine code, which torch runs from Python or from C++."""

__all__ = ["AOTInductor"]

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.export import ExportedProgram

from ...errors import MissingLibraryError
from ...torch_internals import inductor
from .format import Format, Runner


class AOTInductor(Format):
    """Machine code for the device that the model is on."""

    name = "aot_inductor"
    ending = ".pt2"

    def check(self) -> None:
        compilers = (os.environ.get("CXX"), "g++", "clang++", "cl")
        if not any(each and shutil.which(each) for each in compilers):
            raise MissingLibraryError(
                "The format 'aot_inductor' needs a C++ compiler, and there is no g++ or clang++. Install one, or name "
                "it in the environment variable CXX."
            )

    def write(self, program: ExportedProgram, path: Path, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        with torch.no_grad():
            inductor().aoti_compile_and_package(program, package_path=str(path))

    def load(self, path: Path, outputs: Sequence[str]) -> Runner:
        model = inductor().aoti_load_package(str(path))
        return lambda arguments: model(*arguments[0], **arguments[1])
