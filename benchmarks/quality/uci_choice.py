"""How the networks of the regressions are trained: with settings that a validation part chooses, then on all data."""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import bnnify

from .uci_data import Parts, Regression
from .uci_networks import NLL, Networks, densities, scores, train

SMALL, LARGE = 32, 128
"""Batch sizes, for up to and above 2,000 data."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a network is made: as a rule of all that stands here only some is used."""

    share: float = 1.0
    """Of the steps, in which the likelihood alone is maximised; where there is a prior the others are of the ELBO."""
    weight_decay: float = 0.0
    prior_std: float = 0.0

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(self).items() if value)


class Trainer:
    """Trains networks of one kind on the same parts of a data set; what is trained alike is trained once."""

    def __init__(
        self,
        data: Regression,
        pairs: Sequence[tuple[Tensor, Tensor]],
        options: argparse.Namespace,
        kind: type[Networks] = Networks,
    ) -> None:
        self.parts, self.hidden, self.options, self.what = Parts.of(data, pairs), data.hidden, options, data.name
        self.kind = kind
        size = len(data.train(0))
        self.batch_size = SMALL if size <= 2000 else LARGE
        fewest, most = options.steps
        self.steps = min(max(options.epochs * (size // self.batch_size), fewest), most)
        self._trained: dict[Setting, tuple[Networks, NLL]] = {}

    def plain(self, setting: Setting) -> tuple[Networks, NLL]:
        if setting not in self._trained:
            torch.manual_seed(self.options.first_split)
            count, _, features = self.parts.inputs.shape
            networks = self.kind(count, features, self.hidden)
            nll = networks.nll()
            self._train(networks, nll, setting, setting.share)
            self._trained[setting] = networks, nll
        return self._trained[setting]

    def __call__(self, setting: Setting) -> tuple[Tensor, Tensor]:
        """What networks make of the held-out part, and the noise as they have learned it, both (K, S, N, 1)."""
        model: nn.Module
        model, nll = self.plain(dataclasses.replace(setting, prior_std=0.0))
        if setting.prior_std:
            prior, nll = bnnify.Pretrained(std=setting.prior_std), copy.deepcopy(nll)
            model = bnnify.convert(model, select=["w*", "b*"], prior=prior, posterior_std=self.options.initial_std)
            self._train(model, nll, dataclasses.replace(setting, weight_decay=0.0), 1 - setting.share)
        torch.manual_seed(1)
        return densities(model, nll, self.parts.held_inputs, self.options.samples)

    def _train(self, model: nn.Module, nll: NLL, setting: Setting, share: float) -> None:
        steps = round(share * self.steps)
        train(model, nll, self.parts, steps, self.batch_size, setting.weight_decay, f"{self.what}: {setting}")


@dataclasses.dataclass
class Choice:
    """For each split the setting with the largest log-likelihood of its validation part, and what was fitted there.

    With ``learned_noise`` it is the likelihood with the noise that was learned in training.
    """

    settings: list[Setting]
    fit: Tensor

    @classmethod
    def among(cls, grid: Sequence[Setting], validate: Trainer, learned_noise: bool) -> Choice:
        found, fits = [], []
        for setting in grid:
            drawn, learned = validate(setting)
            fits.append(validate.kind.fit(drawn, learned, validate.parts.held_targets))
            noise = learned if learned_noise else validate.kind.noise(fits[-1], learned)
            found.append(scores(drawn, noise, validate.parts)["LL"])
        best = torch.stack(found).nan_to_num(nan=-torch.inf).argmax(0)  # argmax would take NaN
        return cls([grid[number] for number in best], torch.stack(fits)[best, torch.arange(len(best))])


class Refit:
    """Networks with the chosen settings, trained on the whole training part of each split, with several seeds."""

    def __init__(
        self,
        data: Regression,
        choice: Choice,
        members: int,
        options: argparse.Namespace,
        kind: type[Networks] = Networks,
    ) -> None:
        self.choice, self.kind = choice, kind
        self.trainers: dict[int, tuple[Trainer, int]] = {}
        self.found: dict[int, tuple[Tensor, Tensor]] = {}
        for setting in dict.fromkeys(choice.settings):
            splits = [split for split, chosen in enumerate(choice.settings) if chosen == setting]
            pairs = [(data.train(split), data.tests[split]) for split in splits for _ in range(members)]
            trainer = Trainer(data, pairs, options, kind)
            drawn, noise = trainer(setting)
            for number, split in enumerate(splits):
                own = slice(number * members, (number + 1) * members)
                self.trainers[split] = trainer, own.start
                self.found[split] = drawn[:, own], noise[:, own]

    def scores(self, members: int, learned_noise: bool = False) -> list[dict[str, float]]:
        """Of the first members of each split together, as one mixture."""
        return [self._judged(split, *self._predicted(split, members, learned_noise)) for split in sorted(self.found)]

    def averaged(self, other: Refit, learned_noise: bool = False) -> list[dict[str, float]]:
        """Of the first network of each split and another kind's, half each."""
        figures = []
        for split in sorted(self.found):
            predicted = [each._predicted(split, 1, learned_noise) for each in (self, other)]
            figures.append(self._judged(split, *map(torch.cat, zip(*predicted, strict=True))))
        return figures

    def tuned(self, validate: Trainer) -> list[dict[str, float]]:
        """Of the networks as they are, converted, with the factor on σ that the validation part asks for.

        Either with the noise that was learned in training or with that of the validation part: what is likelier there.
        """
        return [self._tuned(split, validate) for split in sorted(self.found)]

    def _predicted(self, split: int, members: int, learned_noise: bool) -> tuple[Tensor, Tensor]:
        drawn, learned = (tensor[:, :members].flatten(0, 1).unsqueeze(1) for tensor in self.found[split])
        return drawn, learned if learned_noise else self.kind.noise(self.choice.fit[split], learned)

    def _tuned(self, split: int, validate: Trainer) -> dict[str, float]:
        networks, nll = validate.plain(self.choice.settings[split])
        held_out = [(validate.parts.held_inputs[split, None], validate.parts.held_targets[split, None])]
        tuned = {}
        for noise in (nll.std[split].item(), self.choice.fit[split].item()):
            known = bnnify.GaussianNLL(noise)
            tuned[noise] = bnnify.tune_std(
                _converted(networks.alone(split)), held_out, likelihood=known, num_samples=32
            )
        noise = min(tuned, key=lambda noise: tuned[noise].after)
        trainer, number = self.trainers[split]
        bnn = _converted(trainer.plain(self.choice.settings[split])[0].alone(number), tuned[noise].factor)
        torch.manual_seed(1)
        nll = bnnify.GaussianNLL(noise)
        found = densities(bnn, nll, trainer.parts.held_inputs[number, None], trainer.options.samples)
        return self._judged(split, *found)

    def _judged(self, split: int, drawn: Tensor, noise: Tensor) -> dict[str, float]:
        trainer, number = self.trainers[split]
        return {name: value.item() for name, value in scores(drawn, noise, trainer.parts.only(number)).items()}


def _converted(networks: nn.Module, factor: float = 1.0) -> bnnify.BayesianModel:
    return bnnify.convert(networks, select=["w*", "b*"], posterior_std=bnnify.Relative(0.04 * factor))
