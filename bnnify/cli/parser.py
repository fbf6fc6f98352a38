"""The commands of ``bnnify-cli`` and their options."""

__all__ = ["make_parser"]

import argparse
from pathlib import Path
from typing import Any

from ..checkpoints.int8 import DTYPES
from ..checkpoints.kinds import POSTERIORS
from ..deployment.formats import FORMATS
from ..draws.estimators import ESTIMATORS
from ..version import __version__
from .arguments import estimator, input_tensor, json_object, posterior, prior, setting, std

_EXAMPLES = {
    "convert": """examples:
  bnnify-cli convert resnet18.pt
  bnnify-cli convert model.safetensors -o model.bnn.safetensors --std 'Relative(0.1)' --exclude 'layer4.*'
  bnnify-cli convert my-lora --base SmolLM2-135M
  bnnify-cli convert mine.ckpt --model package.module:factory --model-args '{"width": 64}'
""",
    "inspect": """examples:
  bnnify-cli inspect resnet18.bnn.pt
  bnnify-cli inspect resnet18.bnn.pt --json | jq .kl
""",
    "collapse": """example:
  bnnify-cli collapse resnet18.bnn.pt -o resnet18-tuned.pt
""",
    "prune": """example:
  bnnify-cli prune resnet18.bnn.pt 0.75 -o resnet18-sparse.bnn.pt
""",
    "export": """examples:
  bnnify-cli export resnet18.bnn.pt -o resnet18.onnx --input 2,3,224,224 --likelihood logits
  bnnify-cli export mine.bnn.pt -o mine.pt2 --model package.module:factory --input ids=int64:2,16 --output-part logits
""",
    "demo": """example:
  bnnify-cli demo --picture digits.png
""",
}


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line; what it parses has the name of the command as ``command``."""
    parser = argparse.ArgumentParser(prog="bnnify-cli", description="Turn a trained PyTorch model into a Bayesian one.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    _add_common_options(parser, False)
    commands = parser.add_subparsers(required=True, dest="command", metavar="command", title="commands")

    command = _command(commands, "convert", "convert a checkpoint, whatever wrote it")
    command.add_argument(
        "checkpoint", type=Path, help="a file of weights, or a Hugging Face model or adapter directory"
    )
    _add_output(command, "name.bnn.pt beside the checkpoint; a name in .safetensors gives that format")
    model = _add_model(command, "the architecture is recognised by its tensors")
    model.add_argument("--base", type=Path, metavar="DIR", help="the directory of the model that a LoRA adapter is for")
    model.add_argument("--key", help="where the state_dict stands in the file, if it holds several")
    model.add_argument("--trust", action="store_true", help="unpickle freely: runs whatever code the file names")
    how = command.add_argument_group(
        "the posterior",
        "A setting may be given per pattern, the first that fits holds: --std 'fc.*=0.01' --std 'Relative(0.1)'",
    )
    how.add_argument("--prior", action="append", type=setting(prior), help="such as 'Gaussian(std=0.1)'")
    how.add_argument("--std", action="append", type=setting(std), help="σ to start with: 0.01, 'Relative(0.1)', …")
    how.add_argument("--posterior", action="append", type=setting(posterior), help=" or ".join(POSTERIORS))
    how.add_argument("--estimator", action="append", type=setting(estimator), help=", ".join(ESTIMATORS))
    how.add_argument("--select", action="append", metavar="GLOB", help="convert these parameters or modules only")
    how.add_argument("--exclude", action="append", metavar="GLOB", help="leave these alone")
    how.add_argument("--strict", action="store_true", help="refuse a model with layers of unknown or unsupported types")
    command.add_argument("--dtype", choices=DTYPES, help="write two bytes for a weight, with a small error")
    command.add_argument("--dry-run", action="store_true", help="show the report and write nothing")

    command = _command(commands, "inspect", "σ, signal-to-noise ratio and KL of each parameter")
    command.add_argument("file", type=Path, help="a file that bnnify wrote")
    command.add_argument("--json", action="store_true", help="as JSON")
    command.add_argument("--plot", type=Path, metavar="PNG", help="draw signal-to-noise ratios and the pruning curve")

    command = _command(commands, "collapse", "write the posterior mean as a checkpoint like the original")
    command.add_argument("file", type=Path, help="a file that bnnify wrote")
    _add_output(command, "name.collapsed with the original's ending")

    command = _command(commands, "prune", "set the weights with the least |μ|/σ to zero")
    command.add_argument("file", type=Path, help="a file that bnnify wrote")
    command.add_argument("fraction", type=float, help="of the Bayesian weights, from 0 to 1")
    command.add_argument("--per-layer", action="store_true", help="of each parameter, rather than of all together")
    _add_output(command, "name.pruned.bnn.pt")

    command = _command(commands, "export", "write networks from the posterior as one graph for another runtime")
    command.add_argument("file", type=Path, help="a file that bnnify wrote")
    command.add_argument("-o", "--output", type=Path, required=True, help="the file to write: .onnx or .pt2")
    command.add_argument("--force", action="store_true", help="write over an existing file")
    command.add_argument(
        "--input",
        action="append",
        required=True,
        type=input_tensor,
        metavar="[NAME=][DTYPE:]SIZES",
        help="what the model is called with, such as 2,3,224,224 or ids=int64:2,16; once for each argument",
    )
    command.add_argument("--format", choices=FORMATS, help="default: the first one with the ending of the output")
    command.add_argument("-n", "--num-samples", type=int, default=8, help="the number of networks; default: 8")
    command.add_argument("--seed", type=int, default=0, help="of the networks that are drawn; default: 0")
    command.add_argument("--likelihood", help="what an output means: logits, probabilities, values, …")
    command.add_argument("--class-dim", type=int, help="the dimension of the classes; default: the last one")
    command.add_argument(
        "--outputs", type=lambda text: text.split(","), help="such as mean,mutual_information,networks"
    )
    command.add_argument(
        "--output-part",
        type=lambda text: int(text) if text.isdecimal() else text,
        help="a key or an index, if the model returns several things",
    )
    command.add_argument("--noise", choices=["input", "local"], help="one network, whose noise is an input of the file")
    _add_model(command, "the file says how to make it")

    command = _command(commands, "demo", "convert and fine-tune a small network that comes with bnnify")
    command.add_argument("--picture", type=Path, metavar="PNG", help="draw what the network is unsure of")
    return parser


def _command(commands: Any, name: str, description: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=description,
        description=f"{description[0].upper()}{description[1:]}.",
        epilog=_EXAMPLES[name],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_common_options(command, argparse.SUPPRESS)
    return command


def _add_common_options(parser: argparse.ArgumentParser, default: Any) -> None:
    """Add the options that may stand before the command's name as well as after it."""
    parser.add_argument("-q", "--quiet", action="store_true", default=default, help="print nothing but errors")
    parser.add_argument("--debug", action="store_true", default=default, help="show the traceback of an error")


def _add_model(command: argparse.ArgumentParser, default: str) -> Any:
    """Add the options that say what makes the model, as a group to which others may be added."""
    model = command.add_argument_group("the model", f"By default {default}.")
    model.add_argument("--model", metavar="package.module:factory", help="what makes the model")
    model.add_argument("--model-args", metavar="JSON", type=json_object, default={}, help="its keyword arguments")
    return model


def _add_output(command: argparse.ArgumentParser, default: str) -> None:
    command.add_argument("-o", "--output", type=Path, help=f"the file to write; default: {default}")
    command.add_argument("--force", action="store_true", help="write over an existing file")
