"""The command ``bnnify-cli``: a thin face over the library."""

__all__ = ["main"]

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from ..errors import BnnifyError
from .commands import COMMANDS
from .parser import make_parser
from .screen import Screen


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: The command line without the program's name. Default: ``None``, that of the process.

    Returns:
        The exit status: 0, or 1 after an error, which is one line on standard error. A wrong command line exits with 2.
    """
    parser = make_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and hasattr(options, "images") and not any(word.startswith("-") for word in rest):
        options.images += map(Path, rest)  # argparse takes only those that stand before the options
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun starts, one speaks for all
    screen = Screen(options.quiet or not first, options.json and first)
    try:
        with warnings.catch_warnings():
            if not options.debug:
                warnings.simplefilter("ignore")
            screen.result(COMMANDS[options.command].run(options, screen))
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt as interrupt:
        return _complain(str(interrupt) or "interrupted; nothing was written")
    except Exception as error:
        if options.debug:
            raise
        known = isinstance(error, BnnifyError)
        text = str(error) if known else f"{type(error).__name__}: {error} (--debug shows where)"
        return _complain(" ".join(text.split()))
    return 0


def _complain(text: str) -> int:
    print(f"bnnify-cli: {text}", file=sys.stderr)
    return 1
