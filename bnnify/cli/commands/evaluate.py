"""``bnnify-cli evaluate``: the report card on test data."""

__all__ = ["EXAMPLES", "HELP", "add_options", "run"]

import argparse
import json
from pathlib import Path
from typing import Any

from ...analysis.evaluate import evaluate
from ...errors import ArgumentError
from ..arguments import count
from ..data import Examples
from ..options import add_data, add_file
from ..outputs import check_picture
from ..screen import Screen, about
from ..work import Work

HELP = "judge accuracy, calibration, and what is told of foreign data"
EXAMPLES = """examples:
  bnnify-cli evaluate resnet18.bnn.pt --data test/
  bnnify-cli evaluate resnet18.bnn.pt --data test/ --validation held-out/ \\
                      --ood others/ --plot report.png
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what ``evaluate`` takes."""
    add_file(parser)
    data = add_data(parser, num_samples=10)
    data.add_argument("--validation", metavar="DATA", help="labelled data to fit a temperature on, as a row beside")
    data.add_argument("--ood", metavar="DATA", help="foreign data, which the networks should be unsure of")
    data.add_argument("--limit", type=count, help="take so many examples of each by chance; default: all")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw reliability, risk and coverage, and histograms")
    parser.add_argument("--force", action="store_true", help="draw over an existing file")
    parser.add_argument("--bootstrap", type=int, default=1000, help="resamples for the intervals; default: 1000")


def run(options: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Evaluate; nothing is written but the picture."""
    read = [Path(each) for each in (options.data, options.validation, options.ood) if each is not None]
    check_picture(options.plot, options.force, options.file, *read)
    work = Work.begin(options, screen)
    examples = work.read(options.data, limit=options.limit)
    if work.meaning.likelihood == "values" and work.meaning.noise_std is None:
        raise ArgumentError(
            "Nothing tells the noise of this regression, without which no interval and no NLL can be judged. Fit it "
            "with `bnnify-cli tune` or `finetune`, or say it with --noise."
        )
    work.describe(examples)
    others: dict[str, Examples | None] = {"validation": None, "ood": None}
    if options.validation is not None:
        others["validation"] = work.read(options.validation, limit=options.limit)
    if options.ood is not None:
        others["ood"] = work.read(options.ood, labelled=False, limit=options.limit)
    every = [examples, *(each for each in others.values() if each is not None)]
    forwards = sum(-(-len(each) // options.batch_size) for each in every) * options.num_samples
    if forwards:
        screen.note(f"evaluating: about {about(forwards * work.seconds)} for {forwards} forwards; fewer with -n")
    validation, foreign = (None if each is None else each.batches(options.batch_size) for each in others.values())
    report = evaluate(
        work.bnn,
        examples.batches(options.batch_size),
        **work.meaning.arguments,
        num_samples=options.num_samples,
        seed=options.seed,
        validation=validation,
        out_of_distribution=foreign,
        bootstrap=options.bootstrap,
        progress=screen.bars,
    )
    screen.report(report)
    if options.plot is not None:
        report.plot(options.plot)
        screen.note(f"wrote {options.plot}")
    return {"plot": options.plot, **json.loads(report.to_json())}
