"""``bnnify-cli prune``: set the weights to zero that the noise drowns."""

__all__ = ["EXAMPLES", "HELP", "add_options", "run"]

import argparse
from typing import Any

from ...analysis.pruning import prune
from ...checkpoints.own_format import open_posterior
from ...checkpoints.write_posterior import write_posterior
from ..history import entry
from ..options import add_file, add_output
from ..outputs import check_weights_output, renamed
from ..screen import Screen

HELP = "set the weights with the least |μ|/σ to zero"
EXAMPLES = """example:
  bnnify-cli prune resnet18.bnn.pt 0.75 -o resnet18-sparse.bnn.pt
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what ``prune`` takes."""
    add_file(parser)
    parser.add_argument("fraction", type=float, help="of the Bayesian weights, from 0 to 1")
    parser.add_argument("--per-layer", action="store_true", help="of each parameter, rather than of all together")
    add_output(parser, "name.pruned.bnn.pt")


def run(options: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Prune, and write the file."""
    output = options.output or renamed(options.file, ".pruned.bnn.pt")
    check_weights_output(output, options.force, options.file)
    file = open_posterior(options.file)
    report = prune(file.parameters_alone(), options.fraction, per_layer=options.per_layer)
    settings = {"fraction": options.fraction, "per_layer": options.per_layer}
    figures = {"weights": report.numel, "pruned": report.pruned}
    # Without the rules for decisions, which were fitted to other predictions.
    history = [*file.history, entry("prune", settings, figures)]
    write_posterior(output, file.state_dict, file.settings, file.origin, file.dtype, history=history)
    screen.report(report)
    screen.note(f"wrote {output}")
    return {"output": output, **figures}
