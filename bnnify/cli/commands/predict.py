"""``bnnify-cli predict``: a row for each example, with what the network says and how sure it is."""

__all__ = ["EXAMPLES", "HELP", "add_options", "run"]

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import ArgumentError
from ..arguments import count
from ..data import read_data
from ..data.images import read_files
from ..options import add_data, add_file
from ..outputs import check_output
from ..page import write_page
from ..rows import make_rows, sorted_rows, written
from ..screen import Screen, about
from ..work import Work

HELP = "predict with how sure the networks are, as CSV, JSON or a page of pictures"
EXAMPLES = """examples:
  bnnify-cli predict resnet18.bnn.pt --data images/ --sort -o unsure.csv
  bnnify-cli predict resnet18.bnn.pt cat.jpg dog.jpg
  bnnify-cli predict resnet18.bnn.pt --data images/ --sort --html unsure.html
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what ``predict`` takes."""
    add_file(parser)
    parser.add_argument("images", type=Path, nargs="*", help="images, in the place of --data")
    parser.add_argument("-o", "--output", type=Path, help=".csv or .jsonl; default: CSV on standard output")
    parser.add_argument("--force", action="store_true", help="write over existing files")
    parser.add_argument("--html", type=Path, metavar="PAGE", help="write a page with the pictures too")
    parser.add_argument("--sort", action="store_true", help="put on top what the networks are least sure of")
    data = add_data(parser, num_samples=10, required=False)
    data.add_argument("--limit", type=count, help="take so many examples by chance; default: all")


def run(options: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Predict, and write what was asked for."""
    read = [*options.images, *([Path(options.data)] if options.data else [])]
    for path in filter(None, (options.output, options.html)):
        check_output(path, options.force, options.file, *read)
    if options.html is not None and options.html.suffix.lower() not in (".html", ".htm"):
        raise ArgumentError(f"Cannot write `{options.html}`: a page ends in .html.")
    ending = None if options.output is None else options.output.suffix.lower()
    if ending not in (None, ".csv", ".jsonl"):
        raise ArgumentError(f"Cannot write `{options.output}`: predictions are written as .csv or .jsonl.")
    if bool(options.images) == bool(options.data):
        raise ArgumentError("Say what to predict: either images, or data with --data.")
    work = Work.begin(options, screen)
    request = replace(work.request, labelled=False)
    source = options.data or "the images"
    examples = read_files(options.images, request) if options.images else read_data(source, request)
    examples = work.fitted(examples.limited(options.limit, options.seed), source)
    work.describe(examples)
    num_batches = -(-len(examples) // options.batch_size)
    if num_batches:
        seconds = num_batches * options.num_samples * work.seconds
        screen.note(f"predicting: about {about(seconds)} with {options.num_samples} networks; fewer with -n")
    prediction = work.bnn.predict(
        examples.batches(options.batch_size),
        options.num_samples,
        **work.meaning.arguments,
        seed=options.seed,
        progress=screen.bars,
    )
    rows = make_rows(prediction, examples.names, work.request.classes, work.bnn.decisions)
    order = sorted_rows(rows) if options.sort else list(range(len(rows)))
    rows = [rows[number] for number in order]
    if options.output is not None:
        written(options.output, rows)
        screen.note(f"wrote {options.output}")
    elif not screen.json and not screen.quiet:
        written(None, rows)
    if options.html is not None:
        pictures = None if examples.pictures is None else [examples.pictures[number] for number in order]
        write_page(options.html, str(options.file), rows, pictures)
        screen.note(f"wrote {options.html}")
    found = {"output": options.output, "html": options.html, "num_data": len(rows)}
    return found | ({} if options.output is not None else {"predictions": rows})
