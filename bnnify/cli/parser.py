"""The command line: the commands and the options that all of them have."""

__all__ = ["make_parser"]

import argparse
<<<<<<< HEAD
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
=======
from importlib.metadata import version
from typing import Any

from .commands import COMMANDS
>>>>>>> wb


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line; what it parses has the name of the command as ``command``."""
    parser = argparse.ArgumentParser(prog="bnnify-cli", description="Turn a trained PyTorch model into a Bayesian one.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    _add_common_options(parser, False)
    commands = parser.add_subparsers(required=True, dest="command", metavar="command", title="commands")
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(
            name,
            help=command.HELP,
            description=f"{command.HELP[0].upper()}{command.HELP[1:]}.",
            epilog=command.EXAMPLES,
            formatter_class=_Formatter,
        )
        _add_common_options(subparser, argparse.SUPPRESS)
        command.add_options(subparser)
    return parser


class _Formatter(argparse.HelpFormatter):
    """Wraps descriptions, and leaves examples as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("example") else super()._fill_text(text, width, indent)


def _add_common_options(parser: argparse.ArgumentParser, default: Any) -> None:
    """Add the options that may stand before the command's name as well as after it."""
    parser.add_argument("-q", "--quiet", action="store_true", default=default, help="print nothing but errors")
    parser.add_argument("--json", action="store_true", default=default, help="print one JSON object, and no report")
    parser.add_argument("--debug", action="store_true", default=default, help="show the traceback of an error")
