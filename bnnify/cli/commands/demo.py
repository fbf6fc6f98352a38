"""``bnnify-cli demo``: a small network on handwritten digits."""

__all__ = ["EXAMPLES", "HELP", "add_options", "run"]

import argparse
from pathlib import Path
from typing import Any

from ..outputs import check_picture
from ..screen import Screen

HELP = "convert and fine-tune a small network that comes with bnnify"
EXAMPLES = """example:
  bnnify-cli demo --picture digits.png
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what ``demo`` takes."""
    parser.add_argument("--picture", type=Path, metavar="PNG", help="draw what the network is unsure of")
    parser.add_argument("--force", action="store_true", help="draw over an existing file")


def run(options: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Run the demo."""
    from ..demo import demo

    check_picture(options.picture, options.force)
    return {"rows": demo(picture=options.picture, quiet=screen.quiet or screen.json)}
