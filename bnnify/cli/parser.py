"""The command line: the commands and the options that all of them have."""

__all__ = ["make_parser"]

import argparse
from typing import Any

from ..version import __version__
from .commands import COMMANDS


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
