"""``bnnify-cli tune``: find the σ that held-out data ask for, and fit rules for decisions."""

__all__ = ["EXAMPLES", "HELP", "add_options", "run"]

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...checkpoints.save_load import save
from ...decisions import Abstention, ConformalIntervals, ConformalSets, Temperature
from ...errors import ArgumentError, check_share
from ...prediction.averages import Prediction
from ...training.tune_std import tune_std
from ..arguments import count
from ..history import entry
from ..options import add_data, add_file, add_output
from ..outputs import check_weights_output, renamed
from ..screen import Screen, about
from ..work import Work

HELP = "find the size of σ that held-out data ask for; nothing is trained"
EXAMPLES = """examples:
  bnnify-cli tune resnet18.bnn.pt --data held-out/
  bnnify-cli tune resnet18.bnn.pt --data images/ --no-labels
  bnnify-cli tune resnet18.bnn.pt --data held-out/ --calibrate others/
"""

_PASSES = 13
"""About how often tune_std goes over the data."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what ``tune`` takes."""
    add_file(parser)
    add_output(parser, "name.tuned.bnn.pt")
    data = add_data(parser, num_samples=4)
    data.add_argument("--limit", type=count, default=64, help="take so many examples by chance; default: 64; 0: all")
    how = parser.add_argument_group("tuning")
    how.add_argument("--labels", action=argparse.BooleanOptionalAction, help="use them; default: where they are there")
    how.add_argument("--tolerance", type=float, help="without labels: the KL allowed, in nats; default: 0.005")
    how.add_argument("--per-layer", action="store_true", help="a factor for each layer too; takes long")
    rules = parser.add_argument_group("decisions", "Rules that predict applies, fitted on other data than --data.")
    rules.add_argument("--calibrate", metavar="DATA", help="labelled data that neither training nor --data has")
    rules.add_argument("--risk", type=float, help="the share of accepted answers that may be wrong; default: 0.05")
    rules.add_argument("--coverage", type=float, default=0.9, help="of sets and intervals; default: 0.9")


def run(options: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Tune, calibrate, and write the file."""
    output = options.output or renamed(options.file, ".tuned.bnn.pt")
    check_weights_output(output, options.force, options.file)
    check_share("--coverage", options.coverage)
    if options.risk is not None:
        check_share("--risk", options.risk)
    if options.labels and options.tolerance is not None:
        raise ArgumentError("--tolerance is for tuning without labels. Leave one of the two out.")
    work = Work.begin(options, screen)
    wanted = False if options.tolerance is not None else options.labels
    examples = work.read(options.data, wanted, options.limit)
    labels = wanted is not False and examples.labelled
    if not labels and wanted is None:
        screen.note("note: the data have no labels; σ becomes as large as --tolerance allows")
    if labels and work.meaning.likelihood == "values" and work.meaning.noise_std is None:
        work.meaning = replace(work.meaning, noise_std=work.residual_std(examples))
    work.describe(examples)
    batches = list(examples.batches(options.batch_size))
    forwards = _PASSES * options.num_samples * len(batches)
    screen.note(
        f"tuning: about {about(forwards * work.seconds)} for {forwards} forwards ({_PASSES} passes × "
        f"{options.num_samples} networks × {len(batches)} batches); fewer with --limit or -n"
    )
    tuned = tune_std(
        work.bnn,
        batches,
        **work.meaning.arguments,
        labels=labels,
        tolerance=0.005 if options.tolerance is None else options.tolerance,
        num_samples=options.num_samples,
        per_layer=options.per_layer,
        seed=options.seed,
        progress=screen.bars,
    )
    screen.report(tuned)
    figures = {"factor": tuned.factor, "before": tuned.before, "after": tuned.after}
    figures |= {"deterministic": tuned.deterministic, "num_data": tuned.num_data}
    work.bnn.decisions.clear()  # they were fitted to other predictions
    if options.calibrate:
        _calibrate(work, options.calibrate)
    told = work.told(examples) | {"labels": labels, "tolerance": tuned.tolerance, "calibrate": options.calibrate}
    work.bnn.history.append(entry("tune", told, figures))
    save(work.bnn, output)
    screen.note(f"wrote {output}")
    rules = {name: str(rule) for name, rule in work.bnn.decisions.items()}
    return {"output": output, **figures, "summary": str(tuned), "decisions": rules}


def _calibrate(work: Work, source: str) -> None:
    """Fit the rules that fit the likelihood. One that was not asked for by its option may fail, with a note."""
    options, screen = work.options, work.screen
    examples = work.read(source)
    targets: list[Tensor] = []
    num_samples = max(options.num_samples, 10)
    with screen.progress("calibrating", None) as advance:
        batches = _with_targets(examples.batches(options.batch_size), targets, advance)
        prediction = work.bnn.predict(batches, num_samples, **work.meaning.arguments, seed=options.seed)
    found = torch.cat(targets).to(prediction.mean.device)
    risk = 0.05 if options.risk is None else options.risk
    rules: dict[str, Callable[[Prediction, Tensor], Any]] = {
        "temperature": Temperature.fit,
        "conformal_sets": lambda prediction, y: ConformalSets.fit(prediction, y, options.coverage),
        "abstention": lambda prediction, y: Abstention.fit(prediction, y, risk),
    }
    if work.meaning.is_regression:
        rules = {"conformal_intervals": lambda prediction, y: ConformalIntervals.fit(prediction, y, options.coverage)}
    for name, fit in rules.items():
        try:
            work.bnn.decisions[name] = fit(prediction, found)
        except ArgumentError as error:
            screen.note(f"note: no {name}: {error}")
        else:
            screen.report(f"{name}: {work.bnn.decisions[name]}")


def _with_targets(batches: Iterable[Any], found: list[Tensor], advance: Callable[[], None]) -> Iterator[Any]:
    """Pass batches on, and keep their targets."""
    for batch in batches:
        if not isinstance(batch, Mapping) and len(batch) < 2:
            raise ArgumentError("--calibrate needs labels, and these data have none.")
        found.append(batch["labels"] if isinstance(batch, Mapping) else batch[1])
        yield batch
        advance()
