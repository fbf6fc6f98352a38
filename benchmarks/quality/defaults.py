"""Which σ should a posterior start with? Trained networks of many kinds are converted and judged without training."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import bnnify

from ..harness import report
from ..harness.evaluation import calibration_error, fit_temperature
from ..harness.networks.subjects import Subject, packaged, subjects
from ..harness.progress import track
from ..harness.report import Run, Table

Scores = dict[str, float]
"""Accuracy in percent, nll in nats and ece, of one predictive distribution; a regression has only an nll."""

DETERMINISTIC, TEMPERATURE = "deterministic", "temperature scaling, labels"
DEFAULT = "bnnify's default: 0.04 rms"

FIXED: dict[str, Callable[[Subject], Any]] = {
    DEFAULT: lambda subject: bnnify.convert(subject.model),
    "0.05 rms": lambda subject: _converted(subject, bnnify.Relative(0.05)),
    "0.1 rms": lambda subject: _converted(subject, bnnify.Relative(0.1)),
    "0.2 rms, full width 32 (default before)": lambda subject: _converted(subject, bnnify.Relative(0.2, full_width=32)),
    **{
        f"ResponseStd({fraction})": lambda subject, fraction=fraction: _converted(  # type: ignore[misc]
            subject, bnnify.ResponseStd(_inputs(subject), fraction)
        )
        for fraction in (0.05, 0.1, 0.15)
    },
}
"""What needs no fitting; ResponseStd sees 500 inputs."""

FITTED: dict[str, Callable[[Subject], Any]] = {
    "constant (PEP)": lambda subject: 0.01,
    "MOPED": lambda subject: bnnify.Moped(0.1),
    "rms": lambda subject: bnnify.Relative(0.1),
    "FisherStd": lambda subject: _fisher(subject),
    "ResponseStd": lambda subject: bnnify.ResponseStd(_inputs(subject)),
}
"""Rules of which tune_std finds the size."""

SMALL = ["MLP*", "LeNet*", "published LeNet*", "published robust*", "transformer*"]
"""The networks that are measured if none are named: all that can be done within some minutes."""

QUICK = ("rms", "ResponseStd")
"""The rules that large networks are fitted with."""


def main() -> None:
    options = _options()
    run = Run(options, ("bnnify", "torch", "torchmetrics", "timm", "transformers"))
    makers = subjects(options.data, options.cache, options.images)
    names = [name for name in makers if any(fnmatch(name, glob) for glob in options.networks)]
    results: dict[str, dict[str, Scores]] = {}
    for file in options.earlier:
        for name, scores in json.loads(file.read_text())["results"].items():
            results[name] = results.get(name, {}) | scores
    for name in names[: 1 if options.quick else None]:
        for rule, scores in measure(makers[name](), options):
            results.setdefault(name, {})[rule] = scores
            run.record(results)
    tables = [*tables_of(results)] if results else []
    if options.packaged:
        tables.append(agreement(options))
    run.show(*tables)


def measure(subject: Subject, options: argparse.Namespace) -> Iterator[tuple[str, Scores]]:
    """The scores of the network as it is and under each rule, all with the same noise but for its scale."""
    torch.manual_seed(0)
    yield DETERMINISTIC, _score(subject, [lambda x: subject.meant(subject.model(x))])
    if subject.likelihood == "logits":
        yield TEMPERATURE, _temperature(subject)
    for name, make in track({} if options.fitted else FIXED.items(), subject.name):
        yield name, _score_bayesian(subject, make(subject), options.samples)
    if options.fixed:
        return
    large = sum(p.numel() for p in subject.model.parameters()) > options.large
    for name, rule in track(FITTED.items(), f"{subject.name}, fitting"):
        for labels in (False, True):
            if name not in QUICK and (large or not labels):
                continue
            bnn = _converted(subject, rule(subject))
            data = subject.batches(subject.fitting)
            tuned = bnnify.tune_std(
                bnn,
                data,
                likelihood=subject.likelihood,
                output=subject.output,
                labels=labels,
                num_samples=options.search_samples,
            )
            scores = _score_bayesian(subject, bnn, options.samples)
            yield f"{name}, {'labels' if labels else 'no labels'}", scores | {"factor": tuned.factor}


def _converted(subject: Subject, rule: Any) -> bnnify.BayesianModel:
    return bnnify.convert(subject.model, posterior_std=rule)


def _inputs(subject: Subject) -> list[Tensor]:
    return list(subject.fitting[0].split(subject.batch_size))


def _fisher(subject: Subject) -> bnnify.FisherStd:
    data = [(x, y) for x, y in subject.batches(subject.fitting)]
    options = {"num_data": 10_000, "likelihood": subject.likelihood, "prior_std": bnnify.Relative(1.0)}
    try:
        return bnnify.FisherStd.estimate(subject.model, data, **options)
    except bnnify.BnnifyError:  # vmap cannot do recurrent layers
        return bnnify.FisherStd.estimate(subject.model, data, chunk_size=1, **options)


def _score_bayesian(subject: Subject, bnn: bnnify.BayesianModel, samples: int) -> Scores:
    torch.manual_seed(1)
    with torch.no_grad():
        draws = [bnn.draw() for _ in range(samples)]

    def drawn(draw: bnnify.Draw) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            with draw:
                return subject.meant(bnn.module(x))

        return forward

    return _score(subject, [drawn(draw) for draw in draws])


@torch.no_grad()
def _score(subject: Subject, networks: list[Callable[[Tensor], Tensor]]) -> Scores:
    """Average the predictive distributions of networks; each sees all data."""
    log_probs: list[Tensor] = []
    for number, network in enumerate(networks):
        for index, (x, y) in enumerate(subject.batches(subject.judging)):
            found = network(x)
            if subject.likelihood == "logits":
                term = found.log_softmax(-1).flatten(0, -2)
            else:
                term = subject.likelihood(found).log_prob(y).flatten()
            if number:
                torch.logaddexp(log_probs[index], term, out=log_probs[index])
            else:
                log_probs.append(term)
    average = torch.cat(log_probs) - math.log(len(networks))
    if subject.likelihood != "logits":
        return {"nll": -average.mean().item()}
    labels = subject.judging[1].flatten()
    scores = {
        "accuracy": 100 * (average.argmax(1) == labels).double().mean().item(),
        "nll": F.nll_loss(average.double(), labels).item(),
    }
    return scores | ({"ece": calibration_error(average.exp(), labels)} if average.shape[1] <= 1000 else {})


def _temperature(subject: Subject) -> Scores:
    with torch.no_grad():
        found = torch.cat([subject.meant(subject.model(x)).flatten(0, -2) for x in _inputs(subject)])
    temperature = fit_temperature(found, subject.fitting[1].flatten())
    scores = _score(subject, [lambda x: subject.meant(subject.model(x)) / temperature])
    return scores | {"temperature": temperature}


def tables_of(results: dict[str, dict[str, Scores]]) -> list[Table]:
    """The rules over all networks, and the networks under some rules, as changes against the deterministic network."""
    rules = list(dict.fromkeys(rule for result in results.values() for rule in result if rule != DETERMINISTIC))
    rows = []
    for rule in rules:
        having = {name: result for name, result in results.items() if "nll" in result.get(rule, {})}
        if not having:
            continue
        changes = {name: _change(result, rule) for name, result in having.items()}
        cells = [rule, str(len(having))]
        for score, worst in (("accuracy", min), ("nll", max), ("ece", max)):
            values = {name: change[score] for name, change in changes.items() if score in change}
            if not values:
                cells += ["", ""]
                continue
            least = worst(values, key=values.__getitem__)
            form = "+.1f" if score == "accuracy" else "+.3f"
            cells += [format(fmean(values.values()), form), f"{format(values[least], form)} ({least.split(',')[0]})"]
        rows.append(cells)
    headings = ["σ", "networks"]
    headings += [f"{what} {score}" for score in ("accuracy", "NLL", "ECE") for what in ("mean", "worst")]
    title = "Change against the deterministic network, as converted, without training"
    shown = [TEMPERATURE, DEFAULT, "ResponseStd(0.1)", "ResponseStd, no labels", "ResponseStd, labels"]
    each = [
        [name, _cell(result[DETERMINISTIC]), *(_cell(_change(result, rule), "+") for rule in shown)]
        for name, result in results.items()
    ]
    return [
        Table(title, headings, rows),
        Table("Accuracy % / NLL / ECE, and changes of them", ["network", DETERMINISTIC, *shown], each),
    ]


def _change(result: dict[str, Scores], rule: str) -> Scores:
    before, after = result[DETERMINISTIC], result.get(rule, {})
    return {score: after[score] - before[score] for score in before if score in after}


def _cell(scores: Scores, sign: str = "") -> str:
    forms = {"accuracy": f"{sign}.1f", "nll": f"{sign}.3f", "ece": f"{sign}.3f"}
    return " / ".join(format(scores[score], form) for score, form in forms.items() if score in scores)


@torch.no_grad()
def agreement(options: argparse.Namespace) -> Table:
    """Networks without labels: how far the average of networks is from the mean network."""
    rules: dict[str, Callable[[Tensor], Any]] = {
        DEFAULT: lambda x: None,
        "0.2 rms, full width 32 (default before)": lambda x: bnnify.Relative(0.2, full_width=32),
        "ResponseStd(0.05)": lambda x: bnnify.ResponseStd(x, 0.05),
        "ResponseStd(0.1)": lambda x: bnnify.ResponseStd(x, 0.1),
    }
    rows = []
    for name, model, inputs in packaged():
        cells = [name]
        alone = _only(model(inputs))
        for make in rules.values():
            rule = make(inputs)
            bnn = bnnify.convert(model) if rule is None else bnnify.convert(model, posterior_std=rule)
            torch.manual_seed(1)
            total = torch.zeros_like(alone)
            for _ in range(options.samples):
                with bnn.draw():
                    total += _only(bnn.module(inputs)) / options.samples
            cosine = F.cosine_similarity(total - total.mean(0), alone - alone.mean(0)).mean().item()
            cells.append(f"{100 * (total.argmax(1) == alone.argmax(1)).double().mean().item():.1f} % / {cosine:.4f}")
        rows.append(cells)
    title = "Average of networks beside the mean network: same largest output / cosine of outputs less their mean"
    return Table(title, ["network", *rules], rows)


def _only(output: Any) -> Tensor:
    return output[-1] if isinstance(output, tuple) else output


def _options() -> argparse.Namespace:
    parser = report.parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, help="folder of archives and checkpoints; else torchvision downloads")
    add("--cache", type=Path, help="folder where trained networks are kept and found again")
    add("--networks", nargs="+", default=SMALL, help="globs of the names of the networks to measure; '*' takes hours")
    add("--earlier", type=Path, nargs="+", default=[], help="results of earlier runs, for the tables")
    add("--images", type=int, default=2000, help="unseen images for each network")
    add("--samples", type=int, default=10, help="networks drawn")
    add("--large", type=int, default=1_000_000, help="parameters from which on only two rules are fitted")
    add("--search-samples", type=int, default=8, help="networks drawn while a rule is fitted")
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--fixed", action="store_true", help="only the rules that need no fitting")
    parts.add_argument("--fitted", action="store_true", help="only the rules that are fitted")
    add("--packaged", action="store_true", help="also the networks that packages ship, by agreement")
    add("--quick", action="store_true", help="one small network and 500 images, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.images = min(options.images, 500)
    return options


if __name__ == "__main__":
    main()
