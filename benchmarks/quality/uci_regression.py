"""The nine regressions of Hernández-Lobato and Adams 2015: RMSE, test log-likelihood and coverage over the 20 splits.

One hidden layer of 50 rectifiers (protein: 100), with one std for the noise, or one for each input. Of each split the
last fifth of the training part, in random order, chooses the settings, from six for each kind of network, each with
the same number of steps; then the network is trained on the whole training part. What is chosen never depends on a
test part.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterator
from functools import cache, partial
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ..harness import report
from ..harness.report import Rows, Table
from .uci_choice import Choice, Refit, Setting, Trainer
from .uci_data import NAMES, read
from .uci_networks import Networks, NoisyNetworks

PUBLISHED = {
    "boston": ("2.90 ± 0.18", "-2.40 ± 0.04"),
    "concrete": ("4.82 ± 0.16", "-2.93 ± 0.02"),
    "energy": ("0.54 ± 0.06", "-1.21 ± 0.01"),
    "kin8nm": ("0.08 ± 0.00", "1.14 ± 0.01"),
    "naval": ("0.00 ± 0.00", "4.45 ± 0.00"),
    "power": ("4.01 ± 0.04", "-2.80 ± 0.01"),
    "protein": ("4.27 ± 0.02", "-2.87 ± 0.00"),
    "wine": ("0.62 ± 0.01", "-0.93 ± 0.01"),
    "yacht": ("0.67 ± 0.05", "-1.25 ± 0.01"),
}
"""MC dropout by grid search: RMSE and log-likelihood, from the README of yaringal/DropoutUncertaintyExps."""
AVERAGE = "bnnify, ELBO, both kinds of noise"
PAIRS = {
    "both kinds on\nboth deterministic": (AVERAGE, "deterministic, both kinds of noise"),
    "noise of each input\non deterministic": (
        "bnnify, ELBO, noise of each input",
        "deterministic, noise of each input",
    ),
    "ensemble on\ndeterministic ensemble": ("bnnify, ELBO, ensemble", "deterministic, ensemble"),
    "both kinds on\ndeterministic ensemble": (AVERAGE, "deterministic, ensemble"),
}
"""The networks that the second table compares split by split, by its headings."""
METRICS = ("RMSE", "LL", "coverage")
LIBRARIES = ("torch", "bnnify")
QUICK = ("boston", "yacht")

PLAIN = tuple(Setting(share, decay) for share, decay in product((0.5, 1.0), (0.0, 0.1, 0.5)))
SHARES = (0.5, 0.8)
"""Of the steps, before those of the ELBO."""
POSTERIORS = ((0.0, 0.03), (0.0, 0.1), (0.1, 0.1))
"""The weight decay before the ELBO, and the std of its prior around the trained weights."""
BAYESIAN = tuple(Setting(share, *rest) for share, rest in product(SHARES, POSTERIORS))
ROWS = ("deterministic", "elbo", "noisy", "averaged", "deterministic-averaged")


def compare(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name in options.data_sets or (NAMES if options.full else QUICK):
        yield from measured(name, options)


def measured(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The networks that are asked for on one data set, as rows of the results."""
    data = read(options.data, name)
    splits = range(len(data.tests))[options.first_split :][: options.splits]
    pairs = [data.validation(split) for split in splits]
    trainer = cache(partial(Trainer, data, pairs, options))

    @cache
    def refit(grid: tuple[Setting, ...], kind: type[Networks], members: int = 1) -> Refit:
        choice = Choice.among(grid, trainer(kind), learned_noise=grid is BAYESIAN)
        return Refit(data, choice, members, options, kind)

    def row(network: str, found: list[dict[str, float]], *of: Refit) -> dict[str, Any]:
        settings = Counter(str(setting) for each in of for setting in each.choice.settings)
        figures = {metric: [round(each[metric], 5) for each in found] for metric in METRICS}
        return {"data": name, "network": network} | figures | {"settings": dict(settings)}

    def deterministic() -> Iterator[dict[str, Any]]:
        plain = refit(PLAIN, Networks, options.members)
        yield row("deterministic", plain.scores(1), plain)
        yield row("deterministic, ensemble", plain.scores(options.members), plain)
        yield row("bnnify, converted, tune_std", plain.tuned(trainer(Networks)), plain)

    def elbo() -> Iterator[dict[str, Any]]:
        tuned = refit(BAYESIAN, Networks, options.members)
        yield row("bnnify, ELBO", tuned.scores(1, learned_noise=True), tuned)
        yield row("bnnify, ELBO, noise of validation", tuned.scores(1), tuned)
        yield row("bnnify, ELBO, ensemble", tuned.scores(options.members, learned_noise=True), tuned)

    def noisy() -> Iterator[dict[str, Any]]:
        """Networks that predict the noise of each target, one for each split."""
        plain, tuned = refit(PLAIN, NoisyNetworks), refit(BAYESIAN, NoisyNetworks)
        yield row("deterministic, noise of each input", plain.scores(1), plain)
        yield row("bnnify, ELBO, noise of each input", tuned.scores(1, learned_noise=True), tuned)

    def averaged() -> Iterator[dict[str, Any]]:
        one, each = refit(BAYESIAN, Networks, options.members), refit(BAYESIAN, NoisyNetworks)
        yield row("bnnify, ELBO, both kinds of noise", one.averaged(each, learned_noise=True), one, each)

    def plain_averaged() -> Iterator[dict[str, Any]]:
        one, each = refit(PLAIN, Networks, options.members), refit(PLAIN, NoisyNetworks)
        yield row("deterministic, both kinds of noise", one.averaged(each), one, each)

    makers = (deterministic, elbo, noisy, averaged, plain_averaged)
    for rows in options.rows:
        yield from dict(zip(ROWS, makers, strict=True))[rows]()


def tables(rows: Rows) -> list[Table]:
    """A section for each data set; what a network gains on the deterministic one is the mean over the same splits."""
    cells: list[list[str]] = []
    for name in NAMES:
        found = {row["network"]: row for row in rows if row["data"] == name}
        if not found:
            continue
        count = len(next(iter(found.values()))["LL"])
        cells += [[f"{name}, {count} splits"], ["MC dropout, published", *PUBLISHED[name], "", ""]]
        for network, row in found.items():
            coverage = f"{100 * fmean(row['coverage']):.1f}"
            gained = ""
            if "deterministic" in found and network != "deterministic":
                plain = found["deterministic"]["LL"]
                gained = mean_and_error([ours - theirs for ours, theirs in zip(row["LL"], plain, strict=True)])
            rmse = mean_and_error(row["RMSE"], 4 if fmean(row["RMSE"]) < 0.2 else 2)
            cells.append([network, rmse, mean_and_error(row["LL"]), gained, coverage])
    headings = ["network", "RMSE", "log-likelihood", "LL gained on\ndeterministic", "coverage of\n90 % intervals"]
    return [Table("UCI regression, mean ± standard error over splits", headings, cells), _pairs(rows)]


def _pairs(rows: Rows) -> Table:
    """The log-likelihood of one network less that of another, and of the average less the published one."""
    cells: list[list[str]] = []
    for name in NAMES:
        found = {row["network"]: row["LL"] for row in rows if row["data"] == name}
        if not found:
            continue
        gained = [""]
        if AVERAGE in found:
            mean, error = map(float, PUBLISHED[name][1].split(" ± "))
            of_both = math.hypot(error, _error(found[AVERAGE]))
            gained = [f"{fmean(found[AVERAGE]) - mean:.3f} ± {of_both:.3f}"]
        for pair in PAIRS.values():
            both = [found[network] for network in pair if network in found]
            gained.append(mean_and_error([a - b for a, b in zip(*both, strict=True)], 3) if len(both) == 2 else "")
        cells.append([name, *gained])
    return Table("Log-likelihood gained, ± standard error", ["data", "both kinds\non published", *PAIRS], cells)


def main() -> None:
    report.run(_options(), LIBRARIES, compare, tables)


def mean_and_error(values: list[float], places: int = 2) -> str:
    return f"{fmean(values):.{places}f} ± {_error(values):.{places}f}"


def _error(values: list[float]) -> float:
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def _options() -> argparse.Namespace:
    parser = report.parser(__doc__, kept=True)
    add = parser.add_argument
    add("--data", type=Path, help="folder with uci_regression.zip")
    add("--data-sets", nargs="+", choices=NAMES, help=f"Default: {', '.join(QUICK)}; with --full all nine")
    add("--full", action="store_true", help="all data sets and all splits")
    add("--splits", type=int, help="how many splits. Default: 5; with --full all")
    add("--first-split", type=int, default=0, help="leave out the splits before it, and seed the training by it")
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="which networks, all others being left out")
    add("--epochs", type=int, default=400, help="of each training")
    add("--steps", type=int, nargs=2, default=[6_000, 24_000], help="the fewest and the most, whatever the epochs")
    add("--initial-std", type=float, default=0.002, help="σ as the ELBO begins")
    add("--members", type=int, default=3, help="networks in an ensemble")
    add("--samples", type=int, default=100, help="draws of the weights per prediction")
    options = parser.parse_args()
    if not (options.data or options.kept):
        parser.error("--data is missing: benchmarks/README.md tells where uci_regression.zip comes from")
    if not (options.full or options.splits):
        options.splits = 5
    return options


if __name__ == "__main__":
    main()
