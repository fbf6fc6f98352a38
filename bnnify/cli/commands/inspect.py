"""``bnnify-cli inspect``: what is in a file."""

__all__ = ["EXAMPLES", "HELP", "add_options", "run"]

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from ...analysis.summary import QUANTILES, ParameterSummary, print_table, summarize
from ...checkpoints.own_format import open_posterior, posterior_parts
from ..history import told
from ..options import add_file
from ..outputs import check_picture
from ..screen import Screen

HELP = "show σ, signal-to-noise ratio and KL of each parameter, and the history"
EXAMPLES = """examples:
  bnnify-cli inspect resnet18.bnn.pt
  bnnify-cli inspect resnet18.bnn.pt --json | jq .kl
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what ``inspect`` takes."""
    add_file(parser)
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw signal-to-noise ratios and the pruning curve")
    parser.add_argument("--force", action="store_true", help="draw over an existing file")


def run(options: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Print a table, and draw."""
    check_picture(options.plot, options.force, options.file)
    summaries, errors = list[ParameterSummary](), dict[str, Any]()
    for part in posterior_parts(options.file):
        summaries += summarize(part.parameters_alone())
        errors |= part.int8
    file = dataclasses.replace(part, int8=errors)
    if options.plot:
        from ...analysis.plots import plot_signal_to_noise

        plot_signal_to_noise(open_posterior(options.file).parameters_alone(), options.plot)
    if not screen.quiet and not screen.json:
        print_table(summaries, ", ".join(filter(None, [str(file.path), str(file.origin), file.precision])))
        if file.history:
            screen.report(told(file.history))
    return {
        "file": str(file.path),
        "model": str(file.origin) or None,
        "dtype": file.dtype,
        "error": dict(file.int8),
        "history": file.history,
        "kl": sum(summary.kl for summary in summaries),
        "quantiles": QUANTILES,
        "parameters": [dataclasses.asdict(summary) for summary in summaries],
    }
