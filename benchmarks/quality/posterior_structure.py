"""What a posterior with covariances would gain on the UCI regressions: a trial, by linearised Laplace approximations.

Of one deterministic network for each split the Gaussian posterior of its weights is computed in closed form, with the
outputs linear in them: with the whole covariance matrix, with that of the last layer alone, and with the diagonal of
the precision alone, which is what a mean-field posterior can hold. Everything else is the same. The noise and the
precision of the prior are chosen on the last fifth of the training part.

Immer et al. 2021, "Improving predictions of Bayesian neural nets via local linearization".
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..harness import report
from ..harness.report import Rows, Table
from .uci_choice import LARGE, SMALL
from .uci_data import NAMES, Parts, read
from .uci_networks import Networks, fitted_noise, train
from .uci_regression import mean_and_error

POSTERIORS = ("none", "diagonal", "last layer", "whole")
PRECISIONS = torch.logspace(-3, 3, 13).tolist()
NOISE_FACTORS = (0.5, 0.7, 0.85, 1.0)
"""By which the noise of the deterministic network is multiplied: some of it is the network's own uncertainty."""


def main() -> None:
    report.run(_options(), ("torch", "bnnify"), compare, _tables)


def compare(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name in options.data_sets:
        yield from _compare(name, options)


def _compare(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The log-likelihood of each split of a data set under each of the posteriors."""
    data = read(options.data, name)
    splits = range(len(data.tests))[: options.splits]
    choosing = Parts.of(data, [data.validation(split) for split in splits])
    judging = Parts.of(data, [(data.train(split), data.tests[split]) for split in splits])
    first, second = (_trained(parts, data.hidden, options.steps, name) for parts in (choosing, judging))
    noises = fitted_noise(first(choosing.held_inputs).detach()[None], choosing.held_targets)
    found: dict[str, list[float]] = {posterior: [] for posterior in POSTERIORS}
    for split in splits:
        parts, noise = choosing.only(split), noises[split].item()
        for posterior in POSTERIORS:
            settings = (
                [(1.0, noise)] if posterior == "none" else product(PRECISIONS, [f * noise for f in NOISE_FACTORS])
            )
            one = _Linearised(first.alone(split), parts, posterior)
            best = max(settings, key=lambda setting: one.log_likelihood(*setting))
            found[posterior].append(
                _Linearised(second.alone(split), judging.only(split), posterior).log_likelihood(*best)
            )
    for posterior, values in found.items():
        yield {"data": name, "posterior": posterior, "LL": [round(value, 5) for value in values]}


def _trained(parts: Parts, hidden: int, steps: int, name: str) -> Networks:
    torch.manual_seed(0)
    count, size, features = parts.inputs.shape
    networks = Networks(count, features, hidden)
    train(networks, networks.nll(), parts, steps, SMALL if size <= 2000 else LARGE, weight_decay=0.1, description=name)
    return networks


class _Linearised:
    """The predictions for the held-out part of a network whose outputs are linear in its weights around where they are.

    With the Jacobians J of the training part, the posterior precision of the weights is JᵀJ/noise² + precision·I.
    """

    def __init__(self, network: Networks, parts: Parts, posterior: str) -> None:
        self.posterior, self.scale = posterior, parts.scale.item()
        with torch.no_grad():
            self.error = (network(parts.held_inputs) - parts.held_targets).flatten().double()
        if posterior == "none":
            return
        names = ("w2", "b2") if posterior == "last layer" else ("w1", "b1", "w2", "b2")
        jacobian, self.held = (_jacobian(network, inputs[0], names) for inputs in (parts.inputs, parts.held_inputs))
        if posterior == "diagonal":
            self.squares = jacobian.square().sum(0)
        else:
            self.values, vectors = torch.linalg.eigh(jacobian.mT @ jacobian)
            self.held = self.held @ vectors

    def log_likelihood(self, precision: float, noise: float) -> float:
        """The mean log density of the held-out targets, in the units of the data."""
        variance = torch.full_like(self.error, noise**2)
        if self.posterior != "none":
            squares = self.squares if self.posterior == "diagonal" else self.values.clamp_min(0)
            variance = variance + self.held.square() @ (1 / (squares / noise**2 + precision))
        log_prob = -0.5 * (self.error.square() / variance + (2 * math.pi * variance).log())
        return log_prob.mean().item() - math.log(self.scale)


def _jacobian(network: Networks, inputs: Tensor, names: tuple[str, ...]) -> Tensor:
    """The derivatives of the output for each of N inputs with respect to the weights of these names, (N, weights)."""
    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}

    def output(chosen: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(network, parameters | chosen, (x.view(1, 1, -1),)).sum()

    chosen = {name: parameters[name] for name in names}
    found = torch.func.vmap(torch.func.grad(output), in_dims=(None, 0))(chosen, inputs)
    return torch.cat([found[name].flatten(1) for name in names], 1).double()


def _tables(rows: Rows) -> list[Table]:
    cells = []
    for name in dict.fromkeys(row["data"] for row in rows):
        found = {row["posterior"]: row["LL"] for row in rows if row["data"] == name}
        gains = [[ours - plain for ours, plain in zip(found[p], found["none"], strict=True)] for p in POSTERIORS[1:]]
        cells.append(
            [f"{name}, {len(found['none'])} splits", mean_and_error(found["none"]), *map(mean_and_error, gains)]
        )
    headings = ["data", "deterministic", *(f"{posterior}, gain" for posterior in POSTERIORS[1:])]
    title = "Log-likelihood, and what a posterior adds to it, mean ± standard error over splits"
    return [Table(title, headings, cells)]


def _options() -> argparse.Namespace:
    parser = report.parser(__doc__, kept=True)
    add = parser.add_argument
    add("--data", type=Path, help="folder with uci_regression.zip")
    add(
        "--data-sets", nargs="+", choices=NAMES, default=["boston", "energy", "yacht", "wine", "concrete"], help="which"
    )
    add("--splits", type=int, default=10, help="the first so many splits")
    add("--steps", type=int, default=4_000, help="of each training")
    options = parser.parse_args()
    if not (options.data or options.kept):
        parser.error("--data is missing: benchmarks/README.md tells where uci_regression.zip comes from")
    return options


if __name__ == "__main__":
    main()
