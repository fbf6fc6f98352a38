"""``bnnify-cli completion``: the script by which a shell completes the command line."""

__all__ = ["EXAMPLES", "HELP", "add_options", "run"]

import argparse
from pathlib import Path
from typing import Any

from ...errors import needing
from ..screen import Screen

HELP = "print what makes a shell complete commands, options and file names"
EXAMPLES = """examples:
  eval "$(bnnify-cli completion bash)"              # in ~/.bashrc
  bnnify-cli completion zsh > ~/.zfunc/_bnnify-cli  # a folder in $fpath
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what ``completion`` takes."""
    parser.add_argument("shell", choices=["bash", "zsh", "tcsh"])


def run(options: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Print the script, which shtab makes of the parser."""
    with needing("shtab", "completion"):
        import shtab
    from ..parser import make_parser

    parser = make_parser()
    _complete_paths(parser, shtab.FILE)
    script = shtab.complete(parser, shell=options.shell)
    screen.report(script)
    return {"shell": options.shell, "script": script}


def _complete_paths(parser: argparse.ArgumentParser, files: Any) -> None:
    """Let file names be completed where a path is asked for, in this parser and those of its commands."""
    for action in parser._actions:
        if action.type is Path or action.dest in ("data", "validation", "ood", "calibrate"):
            action.complete = files  # type: ignore[attr-defined]
        for command in action.choices.values() if action.nargs == argparse.PARSER else ():  # type: ignore[union-attr]
            _complete_paths(command, files)
