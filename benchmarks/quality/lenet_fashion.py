"""LeNet-5 on MNIST and Fashion-MNIST: trained, made Bayesian, fine-tuned, beside what uncertainty-baselines publishes.

The network, the 50,000 training images, the optimizer and the batch size are those of google/uncertainty-baselines,
`baselines/mnist`. The last 10,000 training images are for choosing settings: `--validate` judges by them.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import binary_auroc

import bnnify

from ..harness import methods, peers, report, scores
from ..harness.data import Images, fashion_mnist, mnist
from ..harness.evaluation import Metrics, Result, cross_fitted_temperature, evaluate, grouped, logits, score_cells
from ..harness.fit import Loss, cross_entropy, fit, shuffled
from ..harness.networks.small_networks import cached, lenet5
from ..harness.report import Rows, Table, spread

DATA = {"MNIST": mnist, "Fashion-MNIST": fashion_mnist}
EPOCHS = {"MNIST": 8, "Fashion-MNIST": 15}
"""Length of the deterministic training. Theirs is 25 on both."""
NUM_TRAIN = 50_000
STRANGE = 2_000
"""Images of the other data set, to be told from those of the own."""
ROWS = ("deterministic", "fine-tuned", "converted", "elbo", "ivon", "averaged")
BATCH_SIZE = 256
LEARNING_RATE = 1e-3
PUBLISHED = {
    "MNIST": {
        "deterministic": ("99.1", "0.037", ""),
        "ensemble of 10": ("99.4", "0.016", "0.005"),
        "variational": ("98.5", "0.048", "0.010"),
        "refined variational": ("99.0", "0.034", "0.010"),
    },
    "Fashion-MNIST": {
        "deterministic": ("91.0", "0.321", ""),
        "ensemble of 10": ("93.2", "0.200", "0.010"),
        "variational": ("89.5", "0.292", "0.011"),
        "refined variational": ("90.6", "0.259", "0.011"),
    },
}
"""Test accuracy in percent, NLL, and ECE over ten bins, from the README of `baselines/mnist`."""


def main() -> None:
    report.run(_options(), ("torch", "torchvision", "torchmetrics", "ivon-opt", "bnnify"), compare, tables)


def compare(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for seed in range(options.seeds):
        for name in options.data_sets:
            yield from map(asdict, measured(name, seed, options))


def measured(name: str, seed: int, options: argparse.Namespace) -> Iterator[Result]:
    """Trains one deterministic network, and measures it and all that is made from it."""
    images = DATA[name](True, options.data)
    train = images.take(slice(NUM_TRAIN))
    test = images.take(slice(NUM_TRAIN, None)) if options.validate else DATA[name](False, options.data)
    strange = next(DATA[other] for other in DATA if other != name)(False, options.data).evenly(STRANGE)

    def deterministic(network: nn.Module, row: str, scaled_row: str) -> Iterator[Result]:
        own, foreign = (logits(network, _inputs(some.pixels)) for some in (test, strange))
        auroc = _auroc(entropy=(_entropy(own.softmax(1)), _entropy(foreign.softmax(1))))
        yield Result(name, row, evaluate(own.softmax(1), test.labels), seed, auroc)
        # No network may see the labels it is judged by: each half of the test images gets the other's temperature.
        scaled = cross_fitted_temperature(own, test.labels)
        yield Result(name, scaled_row, evaluate(scaled, test.labels), seed)

    def bayesian(row: str, loss: Loss | None) -> Iterator[Result]:
        torch.manual_seed(seed)
        bnn = bnnify.convert(network, posterior_std=bnnify.Relative(options.fraction, full_width=32))
        if loss:
            fine_tune(bnn, loss, row)
        own, foreign = (
            bnn.predict(DataLoader(_inputs(some.pixels), 500), options.predict_samples, likelihood="logits")
            for some in (test, strange)
        )
        yield sampled(row, own, foreign)

    def sampled(row: str, own: bnnify.Prediction, foreign: bnnify.Prediction) -> Result:
        auroc = _auroc(
            entropy=(own.predictive_entropy, foreign.predictive_entropy),
            mutual_information=(own.mutual_information, foreign.mutual_information),
        )
        return Result(name, row, evaluate(own.mean, test.labels), seed, auroc)

    def by_ivon() -> Iterator[Result]:
        from ivon import IVON

        torch.manual_seed(seed)
        model = copy.deepcopy(network)
        optimizer = IVON(model.parameters(), lr=options.ivon_lr, ess=NUM_TRAIN, hess_init=options.ivon_hess_init)
        description = f"{name}, seed {seed}: IVON"
        _fit(
            model,
            cross_entropy,
            train,
            options.tuning_epochs,
            description,
            decay=True,
            optimizer=optimizer,
            around=lambda: optimizer.sampled_params(train=True),
        )
        networks = methods.ivon_networks(model, optimizer, options.predict_samples)
        predictions = [
            scores.prediction(methods.predicted(networks, _inputs(some.pixels), description))
            for some in (test, strange)
        ]
        yield sampled("IVON, fine-tuned", *predictions)

    def fine_tune(model: nn.Module, loss: Loss, row: str) -> None:
        description = f"{name}, seed {seed}: {row}"
        _fit(model, loss, train, options.tuning_epochs, description, decay=True, rho_lr=options.rho_lr)

    def fine_tuned_alike() -> Iterator[Result]:
        tuned = copy.deepcopy(network)
        fine_tune(tuned, cross_entropy, "fine-tuning")
        row = "deterministic, fine-tuned alike"
        yield from deterministic(tuned, row, f"{row}, temperature")

    network = trained(name, train, seed, options.cache)
    rows: dict[str, Callable[[], Iterator[Result]]] = {
        "deterministic": lambda: deterministic(network, "deterministic", "deterministic, temperature scaling"),
        "fine-tuned": fine_tuned_alike,
        "converted": lambda: bayesian("bnnify, converted", None),
        "elbo": lambda: bayesian("bnnify, fine-tuned by the ELBO", elbo(options.samples)),
        "ivon": by_ivon,
        "averaged": lambda: bayesian(
            "loss of the averaged logits (not an ELBO)", elbo(options.samples, average_first=True)
        ),
    }
    for row in options.rows:
        yield from rows[row]()


def trained(name: str, train: Images, seed: int, cache: Path | None) -> nn.Module:
    """The deterministic network, from the cache or trained now."""
    torch.manual_seed(seed)
    network = lenet5(padding=2)
    file = cache / f"lenet5-{name}-{EPOCHS[name]}-epochs-seed-{seed}.pt" if cache else None
    description = f"{name}, seed {seed}: training"
    cached(network, file, lambda: _fit(network, cross_entropy, train, EPOCHS[name], description))
    return network


def elbo(samples: int, average_first: bool = False) -> Loss:
    """The negative ELBO per image: each draw has a loss of its own, of which the mean is taken.

    Many training scripts average the draws first and then have one loss. That is no bound on anything.
    """
    nll = bnnify.CategoricalNLL()

    def loss(bnn: bnnify.BayesianModel, inputs: Tensor, labels: Tensor) -> Tensor:
        drawn = bnn.sample(inputs, num_samples=samples)
        return bnnify.elbo(nll(drawn.mean(0) if average_first else drawn, labels), bnn.kl(), num_data=NUM_TRAIN)

    return loss


def tables(kept: Rows) -> list[Table]:
    rows: list[list[str]] = []
    groups = grouped([Result(**row | {"metrics": Metrics(**row["metrics"])}) for row in kept])
    for name in dict.fromkeys(data for data, _ in groups):
        rows.append([name])
        rows += [[f"uncertainty-baselines, {row}", *cells, "", ""] for row, cells in PUBLISHED[name].items()]
        for (data, network), runs in groups.items():
            if data == name:
                auroc = [_areas(runs, uncertainty) for uncertainty in ("entropy", "mutual_information")]
                rows.append([network, *score_cells(runs, interval=False), *auroc])
    title = f"LeNet-5 on 10,000 images. AUROC: {STRANGE:,} test images of the other data set told from them"
    return [Table(title, ["network", "accuracy %", "NLL", "ECE", "AUROC\nentropy", "AUROC\nmutual inf."], rows)]


def _areas(runs: list[Result], uncertainty: str) -> str:
    areas = [run.others[uncertainty] for run in runs if uncertainty in run.others]
    return spread(areas) if areas else ""


def _fit(
    model: nn.Module,
    loss: Loss,
    train: Images,
    epochs: int,
    description: str,
    decay: bool = False,
    rho_lr: float = 0.0,
    optimizer: torch.optim.Optimizer | None = None,
    around: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Minimises the loss, by Adam as a rule, with learning rates that are constant or decay to zero along a cosine."""
    if optimizer is None:
        optimizer = torch.optim.Adam(peers.parameter_groups(model, LEARNING_RATE, rho_lr), fused=True)
    size = len(train.labels)
    steps = epochs * -(-size // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if decay else None
    indices = shuffled(size, BATCH_SIZE, steps, drop_last=False)
    fit(
        model,
        optimizer,
        train,
        indices,
        loss,
        prepare=_inputs,
        schedule=schedule,
        around=around,
        steps=steps,
        description=description,
    )


def _inputs(pixels: Tensor) -> Tensor:
    return pixels.float() / 255


def _entropy(probabilities: Tensor) -> Tensor:
    return torch.special.entr(probabilities).sum(1)


def _auroc(**uncertainties: tuple[Tensor, Tensor]) -> dict[str, float]:
    """The area under the ROC curve of each uncertainty, which is given on the own images and on strange ones."""
    areas = {}
    for name, (own, strange) in uncertainties.items():
        is_strange = torch.cat([torch.zeros(len(own)), torch.ones(len(strange))]).int()
        # Ranks: what lies outside [0, 1] torchmetrics takes for logits, and rounds in a sigmoid.
        ranks = torch.cat([own, strange]).unique(return_inverse=True)[1]
        areas[name] = binary_auroc(ranks / ranks.max(), is_strange).item()
    return areas


def _options() -> argparse.Namespace:
    parser = report.parser(__doc__, kept=True)
    add = parser.add_argument
    add("--data", type=Path, help="folder of archives with MNIST and FashionMNIST; else torchvision downloads them")
    add("--data-sets", nargs="+", choices=DATA, default=list(DATA), help="on which to train")
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="what to make of each network")
    add("--cache", type=Path, help="folder where the trained deterministic networks are kept and found again")
    add("--seeds", type=int, default=1, help="how many networks to train on each")
    add("--tuning-epochs", type=int, default=1, help="length of the fine-tuning")
    add("--rho-lr", type=float, default=1e-2, help="learning rate of ρ; 0 keeps σ as converted")
    add("--fraction", type=float, default=0.2, help="σ as converted, relative to the rms of the weights")
    add("--samples", type=int, default=2, help="draws of the weights per training step")
    add("--predict-samples", type=int, default=10, help="draws of the weights per prediction")
    add("--ivon-lr", type=float, default=0.03, help="learning rate of IVON")
    add("--ivon-hess-init", type=float, default=0.1, help="curvature at which IVON starts: the larger, the smaller σ")
    add("--validate", action="store_true", help="judge by the last 10,000 training images instead of the test images")
    return parser.parse_args()


if __name__ == "__main__":
    main()
