"""The rows of `cifar10_methods`: how each method gets its networks from the pretrained one."""

from __future__ import annotations

import argparse
import copy
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import bnnify

from ..harness import methods, peers, scores
from ..harness.data import Images
from ..harness.fine_tuning import BATCH_SIZE, bfloat16, fine_tune, run_steps
from ..harness.methods import Networks
from ..harness.networks.cifar_resnet import inputs

FULL_STEPS = 780
"""Two epochs, as in `cifar10_resnet20`."""
PRECISIONS = (1e5, 1e4, 1e3, 100.0, 10.0, 1.0, 0.1, 0.01, 1e-3)
"""Of Laplace's prior."""
STARTS = ("response", "tuned", 0.2, 0.4)
"""What σ bnnify is fine-tuned from: `ResponseStd(0.1)`, that one tuned, and multiples of the rms of the weights."""
FACTORS = (0.35, 0.5, 0.7, 1.0, 1.4)
"""Of bnnify's tuned σ, where a temperature is fitted with it."""
RATES = (0.05, 0.1, 0.2, 0.4)
"""Of dropout, and σ relative to each weight in bayesian-torch."""


@dataclass(frozen=True)
class Made:
    """A method at work.

    Attributes:
        networks: How it predicts.
        setting: What was chosen on the validation images.
        training: Seconds of the processor for the training, without the trials of other settings.
        temperature: By which the logits of each network are divided. Default: ``1.0``.
    """

    networks: Networks
    setting: str = ""
    training: float = 0.0
    temperature: float = 1.0


class Methods:
    """Makes the rows of the tables.

    Args:
        network: The pretrained network.
        train: All training images.
        validation: Those on which settings are chosen.
        options: Those of the script.
        chosen: The settings chosen so far, by row; a later seed takes those of the first one.
    """

    def __init__(
        self,
        network: nn.Module,
        train: Images,
        validation: Images,
        options: argparse.Namespace,
        chosen: dict[str, str],
    ) -> None:
        self.network, self.train, self.validation, self.options = network, train, validation, options
        self.chosen = chosen
        self.members: dict[int, tuple[nn.Module, float]] = {}

    def rows(self, seed: int) -> dict[str, Callable[[], Made]]:
        """The methods by name; those without randomness only for the first seed.

        A row and the one with a temperature on top of it have the same networks, which are made once.
        """
        count, size = self.options.samples, self.options.members
        own = range(seed * size, (seed + 1) * size)
        found: dict[str, Callable[[], Made]] = {
            "fine-tuned": lambda: self.ensemble(own[:1]),
            "fine-tuned, temperature": lambda: self.tempered(made("fine-tuned")),
            "bnnify, converted": lambda: Made(methods.posterior(bnnify.convert(self.network), count)),
            "bnnify, tuned": self.tuned,
            "bnnify, σ and temperature": lambda: self.best("bnnify, σ and temperature", self.scaled, FACTORS),
            "bnnify, fine-tuned": lambda: self.best("bnnify, fine-tuned", self.elbo, STARTS),
            "bnnify, fine-tuned, temperature": lambda: self.tempered(made("bnnify, fine-tuned")),
            "MC dropout": lambda: self.best("MC dropout", self.dropout, RATES),
            "SWAG": self.swag,
            "IVON": lambda: self.best("IVON", self.ivon, (16.0, 4.0, 1.0, 0.25)),
            "bayesian-torch": lambda: self.best("bayesian-torch", self.bayesian_torch, RATES),
            "Laplace, last layer": lambda: self.laplace("Laplace, last layer", "last_layer", "full", "glm"),
            "Laplace, diagonal, sampled": lambda: self.laplace("Laplace, diagonal, sampled", "all", "diag", "nn"),
            f"ensemble of {size}": lambda: self.ensemble(own),
            f"ensemble of {size}, temperature": lambda: self.tempered(made(f"ensemble of {size}")),
        }
        if seed == 0:
            plain = Made(methods.together(self.network))
            found = {"deterministic": lambda: plain, "temperature": lambda: self.tempered(plain)} | found
            if self.options.linearised:
                row = "Laplace, diagonal, linearised"
                found[row] = lambda: self.laplace(row, "all", "diag", "glm")
        made = functools.lru_cache(maxsize=1)(lambda name: found[name]())
        return {name: functools.partial(made, name) for name in found}

    def best(self, row: str, make: Callable[[Any], Made], candidates: tuple[Any, ...], step: int = 1) -> Made:
        """What has the lowest NLL on every ``step``-th validation image.

        The candidates come in the order of growing noise, and none is tried after one that was worse than that before.
        Each has the random numbers that it has where it is chosen already, in a run that goes on.
        """
        seed = torch.initial_seed()
        if row in self.chosen:
            each = next(each for each in candidates if str(each) == self.chosen[row])
            torch.manual_seed(seed)
            return replace(make(each), setting=str(each))
        part = self.validation.take(slice(None, None, step))
        found: dict[float, tuple[Any, Made]] = {}
        for each in candidates:
            torch.manual_seed(seed)
            made = make(each)
            nll = scores.nll(_logits(made, part) / made.temperature, part.labels)
            print(f"{row}, {each}: NLL {nll:.4f} on validation images", flush=True)
            if found and nll > min(found):
                break
            found[nll] = each, made
        each, made = found[min(found)]
        self.chosen[row] = str(each)
        return replace(made, setting=str(each))

    def tempered(self, made: Made) -> Made:
        temperature = scores.common_temperature(_logits(made, self.validation), self.validation.labels)
        return replace(made, temperature=temperature)

    def _fine_tuned(self, made: peers.Bayesian, num_data: int, description: str) -> tuple[nn.Module, float]:
        """The network after the fine-tuning that all rows have, and how long it took."""
        started = time.process_time()
        decay = 0.98 ** (FULL_STEPS / self.options.steps)  # so that the average spans the same share of any run
        network = fine_tune(
            made,
            num_data,
            self.train,
            steps=self.options.steps,
            lr=self.options.lr,
            decay=min(0.98, decay),
            description=description,
        )
        return network, time.process_time() - started

    def ensemble(self, numbers: range) -> Made:
        """Fine-tuned networks without a posterior; their differences come from the order of the batches alone."""
        for number in numbers:
            if number not in self.members:
                torch.manual_seed(1000 + number)
                made = peers.variant("deterministic", self.network)
                self.members[number] = self._fine_tuned(made, 1, f"network {number}")
        members = [self.members[number] for number in numbers]
        return Made(methods.together(*(network for network, _ in members)), training=sum(cost for _, cost in members))

    def dropout(self, rate: float) -> Made:
        made = peers.deterministic(methods.with_dropout(self.network, rate))
        network, cost = self._fine_tuned(made, 1, f"dropout {rate}")
        return Made(methods.repeated(network, self.options.samples), training=cost)

    def bayesian_torch(self, delta: float) -> Made:
        made = peers.bayesian_torch("Reparameterization", delta)(copy.deepcopy(self.network))
        # Its documentation divides the KL, a sum over tensors of means over their weights, by the size of a batch.
        network, cost = self._fine_tuned(made, BATCH_SIZE, f"bayesian-torch, {delta}")
        return Made(methods.repeated(network, self.options.samples), training=cost)

    def _batches(self) -> list[tuple[Tensor, Tensor]]:
        x, y = inputs(self.validation.pixels), self.validation.labels
        return list(zip(x.split(100), y.split(100), strict=True))

    def _response(self) -> bnnify.ResponseStd:
        return bnnify.ResponseStd([x for x, _ in self._batches()], 0.1)

    @functools.cached_property
    def _tuned_network(self) -> tuple[bnnify.BayesianModel, str, float]:
        started = time.process_time()
        with torch.random.fork_rng(), bfloat16():
            torch.manual_seed(0)  # whichever row asks first
            bnn = bnnify.convert(self.network, posterior_std=self._response())
            found = bnnify.tune_std(bnn, self._batches(), likelihood="logits")
        return bnn, f"σ x {found.factor:.2f}", time.process_time() - started

    def tuned(self) -> Made:
        bnn, setting, cost = self._tuned_network
        return Made(methods.posterior(bnn, self.options.samples), setting, cost)

    def scaled(self, factor: float) -> Made:
        """A multiple of the tuned σ, and the temperature that goes with it."""
        bnn, _, cost = self._tuned_network
        networks = methods.posterior(methods.with_std_times(bnn, factor), self.options.samples)
        return self.tempered(Made(networks, training=cost))

    def elbo(self, start: str | float) -> Made:
        std: Any = self._response() if isinstance(start, str) else bnnify.Relative(start, full_width=32)
        made = peers.variant("bnnify", self.network, channels_last=True, posterior_std=std)
        if start == "tuned":
            bnn = copy.deepcopy(self._tuned_network[0]).to(memory_format=torch.channels_last)
            made = peers.Bayesian(bnn, bnn)
        network, cost = self._fine_tuned(made, len(self.train.labels), f"bnnify, {start}")
        return Made(methods.posterior(network, self.options.samples), training=cost)

    def ivon(self, hess_init: float) -> Made:
        started = time.process_time()
        networks = methods.ivon(
            copy.deepcopy(self.network),
            self.train,
            steps=self.options.steps,
            lr=10 * self.options.lr,  # its momentum is an average of gradients, that of SGD a sum of about ten
            hess_init=hess_init,
            count=self.options.samples,
        )
        return Made(networks, training=time.process_time() - started)

    def swag(self) -> Made:
        """SGD at a constant rate; from a quarter of the steps on, twenty times, the weights are taken down."""
        started = time.process_time()
        steps, swag = self.options.steps, methods.Swag()
        made = peers.variant("deterministic", self.network)
        optimizer = torch.optim.SGD(made.model.parameters(), lr=self.options.lr, momentum=0.9, nesterov=True)
        times = {steps - 1 - round(0.75 * steps / 20 * number) for number in range(20)}
        passed = iter(range(steps))

        def after_step(model: nn.Module) -> None:
            if next(passed) in times:
                swag.collect(model)

        run_steps(made, 1, self.train, optimizer, steps, after_step=after_step, description="SWAG")
        cost = time.process_time() - started

        def drawn(scale: float) -> Made:
            drawn = swag.networks(made.model, self.options.samples, scale, self.train)
            return Made(methods.together(*drawn), training=cost)

        return self.best("SWAG", drawn, (1.0, 2.0, 4.0, 8.0, 16.0, 32.0))

    @functools.cache  # noqa: B019  # one object lives as long as the script
    def _fitted_laplace(self, which: str, structure: str) -> tuple[Any, float]:
        started = time.process_time()
        order = torch.randperm(len(self.train.labels), generator=torch.Generator().manual_seed(0))
        part = self.train.take(order[: self.options.laplace_images * (10 if which == "last_layer" else 1)])
        made = methods.fitted_laplace(self.network, which, structure, part, len(self.train.labels))
        return made, time.process_time() - started

    def laplace(self, row: str, which: str, structure: str, kind: str) -> Made:
        made, cost = self._fitted_laplace(which, structure)
        linearised = which == "all" and kind == "glm"

        def under(precision: float) -> Made:
            batch = 10 if linearised else 100
            return Made(methods.laplace_networks(made, precision, kind, self.options.samples, batch), training=cost)

        return self.best(row, under, PRECISIONS, step=10 if linearised else 1)


def _logits(made: Made, images: Images) -> Tensor:
    with bfloat16():
        return methods.predicted(made.networks, inputs(images.pixels))
