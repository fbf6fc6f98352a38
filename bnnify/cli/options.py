"""Options that several commands have."""

__all__ = ["add_file", "add_model", "add_output", "model_of"]

import argparse
from pathlib import Path
from typing import Any

from torch import nn

from .arguments import factory, json_object


def add_file(parser: argparse.ArgumentParser) -> None:
    """Add the file of a converted model that a command reads."""
    parser.add_argument("file", type=Path, help="a file that bnnify wrote")


def add_model(parser: argparse.ArgumentParser, default: str = "the file says how to make it") -> Any:
    """Add the options that say what makes the model, as a group to which others may be added."""
    group = parser.add_argument_group("the model", f"By default {default}.")
    group.add_argument("--model", metavar="MODULE:NAME", help="what makes the model, as package.module:factory")
    group.add_argument("--model-args", metavar="JSON", type=json_object, default={}, help="its keyword arguments")
    return group


def add_output(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the options that say where to write."""
    parser.add_argument("-o", "--output", type=Path, help=f"the file to write; default: {default}")
    parser.add_argument("--force", action="store_true", help="write over an existing file")


def model_of(options: argparse.Namespace) -> nn.Module | None:
    """Make the model that the command line says; None if it says none."""
    return factory(options.model, options.model_args)() if options.model else None
