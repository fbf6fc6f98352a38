"""``bnnify-cli collapse``: write the posterior mean as a plain checkpoint."""

__all__ = ["EXAMPLES", "HELP", "add_options", "run"]

import argparse
from dataclasses import replace
from typing import Any

from ...checkpoints.atomic import check_new_folder
from ...checkpoints.collapse_shards import collapse_shards
from ...checkpoints.endings import is_one_file
from ...checkpoints.foreign.layout import Layout
from ...checkpoints.foreign.read_write import is_sharded, write
from ...checkpoints.own_format import open_posterior
from ..options import add_file, add_output
from ..outputs import check_weights_output, renamed
from ..screen import Screen

HELP = "write the posterior mean as a checkpoint like the original"
EXAMPLES = """example:
  bnnify-cli collapse resnet18.bnn.pt -o resnet18-tuned.pt
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what ``collapse`` takes."""
    add_file(parser)
    add_output(parser, "name.collapsed with the original's ending, a folder for shards; .safetensors gives that format")


def run(options: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Write the weights in the layout of the original, or in the other format if the name asks for it."""
    if is_sharded(options.file) and (options.output is None or not is_one_file(options.output)):
        folder = options.file if options.file.is_dir() else options.file.parent
        output = options.output or renamed(folder.resolve(), ".collapsed")
        check_new_folder(output)
        tensors = collapse_shards(options.file, output)
        screen.note(f"wrote {output}")
        return {"output": output, "tensors": tensors}
    file = open_posterior(options.file)
    layout, rest = file.origin.layout or Layout("torch"), file.origin.rest
    ending = ".collapsed.safetensors" if layout.kind == "safetensors" else ".collapsed.pt"
    output = options.output or renamed(options.file, ending)
    check_weights_output(output, options.force, options.file)
    if (output.suffix.lower() == ".safetensors") != (layout.kind == "safetensors"):
        kind = "torch" if layout.kind == "safetensors" else "safetensors"
        layout = replace(layout, kind=kind, keys=())
        if rest:
            screen.note("note: left out, as the original was of another format: what stood beside the weights")
        rest = {}
    write(output, layout, file.plain_state_dict, rest)
    screen.note(f"wrote {output}")
    return {"output": output, "tensors": len(layout.names) or len(file.plain_state_dict)}
