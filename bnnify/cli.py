"""The command ``bnnify-cli``: a thin face over the library."""

__all__ = ["main"]

import argparse
import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from torch import nn

from .checkpoint import load_weights, read_state_dict, save
from .convert import convert
from .errors import BnnifyError, CheckpointError

_EXAMPLE = """example:
  bnnify-cli convert resnet18.pt --model torchvision.models:resnet18 -o resnet18.bnn.pt
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: The command line without the program's name. Default: ``None``, that of the process.

    Returns:
        The exit status: 0, or 1 after an error, which is one line on standard error. A wrong command line exits with 2.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except BnnifyError as error:
        if options.debug:
            raise
        print(f"bnnify-cli: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bnnify-cli", description="Turn a trained PyTorch model into a Bayesian one.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('bnnify')}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser(
        "convert",
        help="convert a checkpoint",
        description="Read a checkpoint, convert the model it belongs to, and write it for bnnify.load.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a state_dict or a training checkpoint")
    command.add_argument(
        "--model", required=True, metavar="package.module:factory", help="what makes the model, uncalled"
    )
    command.add_argument("-o", "--output", required=True, type=Path, metavar="OUT", help="the file to write")
    command.add_argument("--force", action="store_true", help="write over an existing file")
    command.set_defaults(run=_convert)
    return parser


def _convert(options: argparse.Namespace) -> None:
    if options.output.exists() and (not options.force or options.output.resolve() == options.checkpoint.resolve()):
        raise CheckpointError(f"`{options.output}` exists. Choose another name, or pass --force.")
    if not options.output.absolute().parent.is_dir():
        raise CheckpointError(f"Cannot write `{options.output}`: its folder does not exist.")
    bnn = convert(_make_model(options.model), inplace=True)
    load_weights(bnn, read_state_dict(options.checkpoint))
    save(bnn, options.output)
    print(bnn.report)


def _make_model(name: str) -> nn.Module:
    module_name, _, factory_name = name.partition(":")
    # As with `python -m`: a module in the working directory can be named.
    sys.path.insert(0, "")
    try:
        model = getattr(importlib.import_module(module_name), factory_name)()
    except Exception as error:
        raise CheckpointError(
            f"Cannot make a model with --model {name}: {type(error).__name__}: {error}. "
            "Give package.module:factory, where factory() returns the model."
        ) from error
    finally:
        sys.path.remove("")
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"--model {name} made a {type(model).__name__}, not a torch.nn.Module.")
    return model
