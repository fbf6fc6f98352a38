"""Active learning on Fashion-MNIST: which images to have labelled next, by mutual information, by entropy, at random.

Each seed begins with labels for some images of a pool, and gets labels for the next in rounds. After each round a
deterministic network is trained from scratch on all labelled images, and judged on test images: it is the same for
every rule, which differ in the labels only. The area under the curve is the mean accuracy over the rounds after the
first, in which all rules have the same labels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

import bnnify

from ..harness import report
from ..harness.data import Images, fashion_mnist
from ..harness.evaluation import logits
from ..harness.fit import cross_entropy, fit, shuffled
from ..harness.progress import track
from ..harness.report import Rows, Table, spread

LIBRARIES = ("torch", "torchvision", "bnnify")
BATCH_SIZE = 50
VALIDATION = slice(50_000, None)
"""The last of the training images are in no pool: `--validate` judges by them."""

Rule = Callable[[nn.Module, Images, Images, argparse.Namespace], Tensor]
"""From the network, the labelled images and the others to a score for each of the others: the highest are labelled."""


def network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 5, 2), nn.ReLU(), nn.Conv2d(16, 32, 5, 2), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def at_random(model: nn.Module, labelled: Images, others: Images, options: argparse.Namespace) -> Tensor:
    return torch.rand(len(others.labels))


def entropy(model: nn.Module, labelled: Images, others: Images, options: argparse.Namespace) -> Tensor:
    return torch.special.entr(logits(model, inputs(others.pixels)).softmax(1)).sum(1)


def mutual_information(model: nn.Module, labelled: Images, others: Images, options: argparse.Namespace) -> Tensor:
    return _bayesian(model, labelled, others, options).mutual_information


def predictive_entropy(model: nn.Module, labelled: Images, others: Images, options: argparse.Namespace) -> Tensor:
    return _bayesian(model, labelled, others, options).predictive_entropy


def drawn(rule: Rule) -> Rule:
    """Images are drawn without replacement, in proportion to their scores, instead of taking the highest.

    The highest of ``log score + Gumbel noise`` are such a draw. Kirsch et al. 2021, "Stochastic Batch Acquisition".
    """

    def noisy(model: nn.Module, labelled: Images, others: Images, options: argparse.Namespace) -> Tensor:
        scores = rule(model, labelled, others, options)
        return scores.clamp_min(torch.finfo(scores.dtype).tiny).log() - torch.empty_like(scores).exponential_().log()

    return noisy


def one_after_another(model: nn.Module, labelled: Images, others: Images, options: argparse.Namespace) -> Tensor:
    """Each image is the one of which the networks differ most, given the labels of those chosen before it.

    Their probabilities count as Gaussian, with the covariance between images that the networks have, summed over the
    classes. MaxDet in Holzmüller et al. 2023, "A Framework and Benchmark for Deep Batch Active Learning for
    Regression"; a greedy BatchBALD, if that were true.
    """
    bnn = _fine_tuned(model, labelled, options)
    with torch.no_grad():
        probabilities = bnn.sample(inputs(others.pixels), num_samples=options.samples).softmax(-1)
    features = (probabilities - probabilities.mean(0)).double().movedim(1, 0).flatten(1)
    noise = features.square().sum(1).mean()  # of a label
    scores = torch.full((len(features),), -torch.inf)
    for place in range(options.each):
        variances = features.square().sum(1).where(scores.isinf(), 0.0)
        best = variances.argmax()
        scores[best] = -place
        # The covariance of Gaussians given what was seen of one: K - K_b K_bᵀ / (K_bb + noise), for its root.
        direction = features[best] / variances[best].sqrt()
        known = 1 - (noise / (noise + variances[best])).sqrt()
        features = features - known * (features @ direction).outer(direction)
    return scores


RULES: dict[str, Rule] = {
    "random": at_random,
    "entropy of the deterministic network": entropy,
    "entropy of the deterministic network, drawn": drawn(entropy),
    "mutual information, bnnify": mutual_information,
    "mutual information, bnnify, drawn": drawn(mutual_information),
    "variance, one after another, bnnify": one_after_another,
    "entropy of the average, bnnify": predictive_entropy,
}


def learn(rule: str, seed: int, images: Images, judged: Images, options: argparse.Namespace) -> list[float]:
    """The accuracy after each round, in percent."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images.labels), generator=generator)[: options.pool]
    labelled, others = order[: options.first], order[options.first :]
    accuracies = []
    for number in range(options.rounds + 1):
        torch.manual_seed(1_000 * seed + number)
        model = network()
        _fit(model, images.take(labelled), cross_entropy, options.steps, bayesian=False)
        found = logits(model, inputs(judged.pixels)).argmax(1)
        accuracies.append(100 * (found == judged.labels).double().mean().item())
        if number < options.rounds:
            scores = RULES[rule](model, images.take(labelled), images.take(others), options)
            by_score = others[scores.argsort(descending=True)]
            labelled, others = torch.cat([labelled, by_score[: options.each]]), by_score[options.each :]
    return accuracies


def tables(rows: Rows) -> list[Table]:
    """The mean and the standard deviation over seeds of the area, what it gains on random, and the last accuracy."""
    rules = dict.fromkeys(row["rule"] for row in rows)
    curves = {rule: {row["seed"]: row["accuracy"] for row in rows if row["rule"] == rule} for rule in rules}
    cells = []
    for rule, of_seeds in curves.items():
        areas = {seed: fmean(curve[1:]) for seed, curve in of_seeds.items()}
        reference = curves.get("random", {})
        gained = [area - fmean(reference[seed][1:]) for seed, area in areas.items() if seed in reference]
        ends = [curve[-1] for curve in of_seeds.values()]
        middle = [curve[len(curve) // 2] for curve in of_seeds.values()]
        gain = spread(gained, 2) if gained and rule != "random" else ""
        cells.append([rule, spread(list(areas.values()), 2), gain, spread(middle, 2), spread(ends, 2)])
    headings = [
        "labels chosen by",
        "area under the curve",
        "gained on random",
        "accuracy half-way",
        "accuracy at the end",
    ]
    return [Table("Active learning on Fashion-MNIST: accuracy in percent, mean ± std over seeds", headings, cells)]


def main() -> None:
    report.run(_options(), LIBRARIES, compare, tables)


def compare(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    images = fashion_mnist(True, options.data)
    judged = images.take(VALIDATION) if options.validate else fashion_mnist(False, options.data)
    pool = images.take(slice(VALIDATION.start))
    runs = [
        (seed, rule) for seed in range(options.first_seed, options.first_seed + options.seeds) for rule in options.rules
    ]
    for seed, rule in track(runs, "active learning"):
        yield {"rule": rule, "seed": seed, "accuracy": learn(rule, seed, pool, judged, options)}


def inputs(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


def _bayesian(model: nn.Module, labelled: Images, others: Images, options: argparse.Namespace) -> Any:
    """The prediction of the network made Bayesian and fine-tuned by the ELBO on the labelled images."""
    bnn = _fine_tuned(model, labelled, options)
    return bnn.predict(inputs(others.pixels), options.samples, likelihood="logits")


def _fine_tuned(model: nn.Module, labelled: Images, options: argparse.Namespace) -> bnnify.BayesianModel:
    bnn = bnnify.convert(model, posterior_std=bnnify.Relative(options.fraction))
    nll, size = bnnify.CategoricalNLL(), len(labelled.labels)

    def loss(bnn: bnnify.BayesianModel, images: Tensor, labels: Tensor) -> Tensor:
        output, kl = bnn(images)
        return bnnify.elbo(nll(output, labels), kl, num_data=size)

    _fit(bnn, labelled, loss, options.tuning_steps, bayesian=True)
    return bnn


def _fit(model: Any, images: Images, loss: Any, steps: int, bayesian: bool) -> None:
    groups = model.parameter_groups(lr=1e-3, rho_lr=2e-2) if bayesian else model.parameters()
    optimizer = torch.optim.Adam(groups, lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    indices = shuffled(len(images.labels), min(BATCH_SIZE, len(images.labels)), steps)
    fit(model, optimizer, images, indices, loss, prepare=inputs, schedule=schedule, steps=steps)


def _options() -> argparse.Namespace:
    parser = report.parser(__doc__, kept=True)
    add = parser.add_argument
    add("--data", type=Path, help="folder of archives with FashionMNIST; else torchvision downloads it")
    add("--rules", nargs="+", choices=RULES, default=list(RULES), help="by which images are chosen")
    add("--seeds", type=int, default=3, help="how many times, each with other first labels")
    add("--first-seed", type=int, default=0, help="the first of them")
    add("--pool", type=int, default=4_000, help="images from which to choose")
    add("--first", type=int, default=100, help="labels to begin with")
    add("--each", type=int, default=50, help="labels for each round")
    add("--rounds", type=int, default=8, help="how often labels are given")
    add("--steps", type=int, default=300, help="batches of 50, for each network")
    add("--tuning-steps", type=int, default=300, help="batches of 50, for the ELBO")
    add(
        "--fraction",
        type=float,
        default=0.3,
        help="σ as converted, and of the prior, relative to the rms of the weights",
    )
    add("--samples", type=int, default=20, help="draws of the weights per prediction")
    add("--validate", action="store_true", help="judge by the last 10,000 training images instead of the test images")
    return parser.parse_args()


if __name__ == "__main__":
    main()
