"""The nine regressions of Hernández-Lobato and Adams 2015: RMSE, test log-likelihood and coverage over the 20 splits.

One hidden layer of 50 rectifiers (protein: 100). Of each split the last fifth of the training part, in random order,
chooses the settings, from six for each kind of network, each with the same number of steps; then the network is trained
on the whole training part. What is chosen never depends on a test part.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn

import bnnify

from ..harness import report, results
from ..harness.report import Run, Table
from .uci_data import NAMES, Parts, Regression, read
from .uci_networks import Networks, fitted_noise, outputs, scores, train

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
METRICS = ("RMSE", "LL", "coverage")
LIBRARIES = ("torch", "bnnify")
QUICK = ("boston", "energy", "yacht", "wine")
SMALL, LARGE = 32, 128
"""Batch sizes, for up to and above 2,000 data."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a network is made: as a rule of all that stands here only some is used."""

    long: bool = True
    weight_decay: float = 0.0
    prior_std: float = 0.0

    def __str__(self) -> str:
        given = {name: value for name, value in dataclasses.asdict(self).items() if name != "long" and value}
        return ", ".join([*(["half the steps"] if not self.long else []), *(f"{k} {v}" for k, v in given.items())])


PLAIN = [Setting(long, decay) for long, decay in product((False, True), (0.0, 0.1, 0.5))]
ELBO = [Setting(False, decay, prior_std=std) for decay, std in product((0.0, 0.1), (0.05, 0.1, 0.2))]
"""Half of the steps train the network, with this weight decay, the other half its posterior."""


class Trainer:
    """Trains networks on the same parts; what is trained alike is trained once."""

    def __init__(self, parts: Parts, hidden: int, options: argparse.Namespace, what: str) -> None:
        self.parts, self.hidden, self.options, self.what = parts, hidden, options, what
        self.batch_size = SMALL if parts.inputs.shape[1] <= 2000 else LARGE
        self._trained: dict[Setting, tuple[Networks, bnnify.GaussianNLL]] = {}

    def plain(self, setting: Setting) -> tuple[Networks, bnnify.GaussianNLL]:
        if setting not in self._trained:
            torch.manual_seed(0)
            count, _, features = self.parts.inputs.shape
            networks = Networks(count, features, self.hidden)
            nll = bnnify.GaussianNLL(std=torch.full((count, 1, 1), 0.5), learned=True)
            self._train(networks, nll, setting, 2 if setting.long else 1)
            self._trained[setting] = networks, nll
        return self._trained[setting]

    def __call__(self, setting: Setting) -> tuple[Tensor, Tensor]:
        """What networks make of the held-out part, and the std of their noise as it was learned."""
        model: nn.Module
        model, nll = self.plain(dataclasses.replace(setting, prior_std=0.0))
        if setting.prior_std:
            prior, nll = bnnify.Pretrained(std=setting.prior_std), copy.deepcopy(nll)
            model = bnnify.convert(model, select=["w*", "b*"], prior=prior, posterior_std=0.02)
            self._train(model, nll, dataclasses.replace(setting, weight_decay=0.0), 1)
        torch.manual_seed(1)
        return outputs(model, self.parts.held_inputs, self.options.samples), nll.std.detach()

    def _train(self, model: nn.Module, nll: bnnify.GaussianNLL, setting: Setting, halves: int) -> None:
        steps = halves * self.options.steps // 2
        train(model, nll, self.parts, steps, self.batch_size, setting.weight_decay, f"{self.what}: {setting}")


@dataclasses.dataclass
class Choice:
    """For each split the setting with the largest log-likelihood of its validation part, and the noise fitted there.

    With ``learned_noise`` it is the likelihood with the noise that was learned in training.
    """

    settings: list[Setting]
    noise: Tensor

    @classmethod
    def among(cls, grid: list[Setting], validate: Trainer, learned_noise: bool) -> Choice:
        found, noises = [], []
        for setting in grid:
            drawn, learned = validate(setting)
            noises.append(fitted_noise(drawn, validate.parts.held_targets))
            found.append(scores(drawn, learned if learned_noise else noises[-1], validate.parts)["LL"])
        best = torch.stack(found).argmax(0)
        return cls([grid[number] for number in best], torch.stack(noises)[best, torch.arange(len(best))])


class Refit:
    """Networks with the chosen settings, trained on the whole training part of each split, with several seeds."""

    def __init__(self, data: Regression, choice: Choice, members: int, options: argparse.Namespace, what: str) -> None:
        self.choice = choice
        self.trainers: dict[int, tuple[Trainer, int]] = {}
        self.found: dict[int, tuple[Tensor, Tensor]] = {}
        for setting in dict.fromkeys(choice.settings):
            splits = [split for split, chosen in enumerate(choice.settings) if chosen == setting]
            pairs = [(data.train(split), data.tests[split]) for split in splits for _ in range(members)]
            trainer = Trainer(Parts.of(data, pairs), data.hidden, options, what)
            drawn, noise = trainer(setting)
            for number, split in enumerate(splits):
                own = slice(number * members, (number + 1) * members)
                self.trainers[split] = trainer, own.start
                self.found[split] = drawn[:, own], noise[own]

    def scores(self, members: int, learned_noise: bool = False) -> list[dict[str, float]]:
        """Of the first members of each split together, as one mixture."""
        return [self._scores(split, members, learned_noise) for split in sorted(self.found)]

    def tuned(self, validate: Trainer) -> list[dict[str, float]]:
        """Of the networks as they are, converted, with the factor on σ that the validation part asks for.

        Either with the noise that was learned in training or with that of the validation part: what is likelier there.
        """
        return [self._tuned(split, validate) for split in sorted(self.found)]

    def _scores(self, split: int, members: int, learned_noise: bool) -> dict[str, float]:
        drawn, learned = (tensor[..., :members, :, :] for tensor in self.found[split])
        noise = learned if learned_noise else self.choice.noise[split].expand_as(learned)
        together = drawn.flatten(0, 1).unsqueeze(1)
        return self._judged(split, together, noise.repeat(len(drawn), 1, 1).unsqueeze(1))

    def _tuned(self, split: int, validate: Trainer) -> dict[str, float]:
        networks, nll = validate.plain(self.choice.settings[split])
        held_out = [(validate.parts.held_inputs[split, None], validate.parts.held_targets[split, None])]
        tuned = {}
        for noise in (nll.std[split].item(), self.choice.noise[split].item()):
            known = bnnify.GaussianNLL(noise)
            tuned[noise] = bnnify.tune_std(
                _converted(networks.alone(split)), held_out, likelihood=known, num_samples=32
            )
        noise = min(tuned, key=lambda noise: tuned[noise].after)
        trainer, number = self.trainers[split]
        bnn = _converted(trainer.plain(self.choice.settings[split])[0].alone(number), tuned[noise].factor)
        torch.manual_seed(1)
        drawn = outputs(bnn, trainer.parts.held_inputs[number, None], trainer.options.samples)
        return self._judged(split, drawn, torch.full((1, 1, 1), noise))

    def _judged(self, split: int, drawn: Tensor, noise: Tensor) -> dict[str, float]:
        trainer, number = self.trainers[split]
        return {name: value.item() for name, value in scores(drawn, noise, trainer.parts.only(number)).items()}


def compare(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All networks on one data set, as rows of the results."""
    data = read(options.data, name)
    splits = range(len(data.tests))[: options.splits]
    validate = Trainer(Parts.of(data, [_validation(data, split) for split in splits]), data.hidden, options, name)

    def refit(grid: list[Setting], members: int, learned_noise: bool = False) -> Refit:
        return Refit(data, Choice.among(grid, validate, learned_noise), members, options, name)

    def row(network: str, of: Refit, found: list[dict[str, float]]) -> dict[str, Any]:
        settings = Counter(map(str, of.choice.settings))
        figures = {metric: [round(each[metric], 5) for each in found] for metric in METRICS}
        return {"data": name, "network": network} | figures | {"settings": dict(settings)}

    plain = refit(PLAIN, options.members)
    yield row("deterministic", plain, plain.scores(1))
    yield row("deterministic, ensemble", plain, plain.scores(options.members))
    yield row("bnnify, converted, tune_std", plain, plain.tuned(validate))
    tuned = refit(ELBO, options.members, learned_noise=True)
    yield row("bnnify, ELBO", tuned, tuned.scores(1, learned_noise=True))
    yield row("bnnify, ELBO, noise of validation", tuned, tuned.scores(1))
    yield row("bnnify, ELBO, ensemble", tuned, tuned.scores(options.members, learned_noise=True))


def table(rows: list[dict[str, Any]], names: list[str]) -> Table:
    cells: list[list[str]] = []
    for name in names:
        found = {row["network"]: row for row in rows if row["data"] == name}
        if not found:
            continue
        count = len(found["deterministic"]["LL"])
        cells += [[f"{name}, {count} splits"], ["MC dropout, published", *PUBLISHED[name], "", ""]]
        for network, row in found.items():
            gain = [ours - plain for ours, plain in zip(row["LL"], found["deterministic"]["LL"], strict=True)]
            coverage = f"{100 * fmean(row['coverage']):.1f}"
            gained = "" if network == "deterministic" else _mean(gain)
            cells.append(
                [network, _mean(row["RMSE"], 4 if fmean(row["RMSE"]) < 0.2 else 2), _mean(row["LL"]), gained, coverage]
            )
    headings = ["network", "RMSE", "log-likelihood", "LL gained on\ndeterministic", "coverage of\n90 % intervals"]
    return Table("UCI regression, mean ± standard error over splits", headings, cells)


def main() -> None:
    options = _options()
    names = options.data_sets or list(NAMES if options.full else QUICK)
    if options.from_files:
        kept = [results.load(path) for path in options.from_files]
        report.show(table([row for each in kept for row in each.rows], list(NAMES)), options.markdown)
        print("\n".join(line for each in kept for line in each.notes()))
        return
    run = Run(options, LIBRARIES)
    rows: list[dict[str, Any]] = []
    for name in names:
        rows += compare(name, options)
        if options.output:
            settings = {name: getattr(options, name) for name in ("steps", "members", "samples")}
            results.save(options.output, settings, rows, LIBRARIES)
    run.show(table(rows, names))


def _validation(data: Regression, split: int) -> tuple[Tensor, Tensor]:
    """The rows of the training part, in random order: the first four fifths, and the rest."""
    train = data.train(split)
    train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(split))]
    return train[: -(len(train) // 5)], train[-(len(train) // 5) :]


def _converted(networks: nn.Module, factor: float = 1.0) -> bnnify.BayesianModel:
    return bnnify.convert(networks, select=["w*", "b*"], posterior_std=bnnify.Relative(0.04 * factor))


def _mean(values: list[float], places: int = 2) -> str:
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{fmean(values):.{places}f} ± {error:.{places}f}"


def _options() -> argparse.Namespace:
    parser = report.parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, help="folder with uci_regression.zip")
    add("--data-sets", nargs="+", choices=NAMES, help=f"Default: {', '.join(QUICK)}; with --full all nine")
    add("--full", action="store_true", help="all data sets and all splits")
    add("--splits", type=int, help="the first so many splits. Default: 5; with --full all")
    add("--steps", type=int, default=6_000, help="of each training; the ELBO gets half of them")
    add("--members", type=int, default=3, help="networks in an ensemble")
    add("--samples", type=int, default=100, help="draws of the weights per prediction")
    add("--from", dest="from_files", nargs="+", type=Path, help="print the table of these results, and run nothing")
    options = parser.parse_args()
    if not (options.data or options.from_files):
        parser.error("--data is missing: benchmarks/README.md tells where uci_regression.zip comes from")
    if not (options.full or options.splits):
        options.splits = 5
    return options


if __name__ == "__main__":
    main()
