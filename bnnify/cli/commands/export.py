"""``bnnify-cli export``: write networks as one graph for another runtime."""

__all__ = ["EXAMPLES", "HELP", "add_options", "run"]

import argparse
import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from ...checkpoints.save_load import load
from ...deployment.export import export
from ...deployment.formats import FORMATS
from ..arguments import example_inputs, input_tensor, key_or_index
from ..options import add_file, add_model, model_of
from ..outputs import check_output
from ..screen import Screen

HELP = "write networks from the posterior as one graph for another runtime"
EXAMPLES = """examples:
  bnnify-cli export resnet18.bnn.pt -o resnet18.onnx --input 2,3,224,224 \\
                    --likelihood logits
  bnnify-cli export mine.bnn.pt -o mine.pt2 --model package.module:factory \\
                    --input ids=int64:2,16 --output-part logits
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what ``export`` takes."""
    add_file(parser)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the file to write: .onnx or .pt2")
    parser.add_argument("--force", action="store_true", help="write over an existing file")
    parser.add_argument(
        "--input",
        action="append",
        required=True,
        type=input_tensor,
        metavar="SIZES",
        help="what the model is called with, as [NAME=][DTYPE:]SIZES, such as 2,3,224,224 or ids=int64:2,16; once for "
        "each argument",
    )
    parser.add_argument("--format", choices=FORMATS, help="default: the first one with the ending of the output")
    parser.add_argument("-n", "--num-samples", type=int, default=8, help="the number of networks; default: 8")
    parser.add_argument("--seed", type=int, default=0, help="of the networks that are drawn; default: 0")
    parser.add_argument("--likelihood", help="what an output means: logits, probabilities, values, …")
    parser.add_argument("--class-dim", type=int, help="the dimension of the classes; default: the last one")
    parser.add_argument("--outputs", type=lambda text: text.split(","), help="such as mean,mutual_information,networks")
    parser.add_argument(
        "--output-part", type=key_or_index, help="a key or an index, if the model returns several things"
    )
    parser.add_argument("--noise", choices=["input", "local"], help="one network, whose noise is an input of the file")
    add_model(parser)


def run(options: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Export, and say how far the file is from the model."""
    check_output(options.output, options.force, options.file)
    bnn = load(options.file, model_of(options))
    torch.manual_seed(options.seed)
    with nullcontext() if options.debug else _unseen():
        found = export(
            bnn,
            options.output,
            example_inputs(options.input),
            num_samples=options.num_samples,
            likelihood=options.likelihood,
            outputs=options.outputs,
            output=options.output_part,
            class_dim=options.class_dim,
            format=options.format,
            noise=options.noise,
        )
    screen.report(found)
    screen.note(f"wrote {options.output}")
    return {"output": options.output, "report": str(found)}


@contextmanager
def _unseen() -> Iterator[None]:
    """Hide what the exporters of torch log and print beside what they raise."""
    before = logging.root.manager.disable
    logging.disable()
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
