"""Bayesian LoRA on a real language model: SmolLM2-135M on sentences of SST-2, beside what people would use instead."""

from __future__ import annotations

import argparse
import copy
import csv
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_auroc

import bnnify
from bnnify.distributions.initial_std import Constant
from bnnify.modules.adapters import adapter_pairs

from ..harness import report
from ..harness.evaluation import Metrics, Result, calibration_error, evaluate, fit_temperature, grouped, score_cells
from ..harness.fetch import in_folder
from ..harness.networks.language_model import Texts, UpperLayers, language_model, smollm2, texts
from ..harness.progress import track
from ..harness.report import Run, Table, spread

PROMPT = "Review: {}\nSentiment:"
ANSWERS = (" negative", " positive")
OTHER_WORDS = 25
"""How many words of a news item are read, about as many as a review has."""

A, A_AND_B = "*.lora_A.*", "*.lora_*"
ENSEMBLE = "LoRAs of all seeds, averaged"
ROWS = ["LoRA*", "MC dropout", *(f"bnnify, {how}" for how in ("as converted", "tuned, labels", "tuned, then the ELBO"))]

Predict = Callable[[Any], Tensor]
"""From what the upper layers take to the probabilities of each network, shape (K, N, 2)."""


def main() -> None:
    options = _options()
    run = Run(options, ("bnnify", "torch", "transformers", "peft", "torchmetrics"))
    results = [result for file in options.merge for result in _read(file)]
    run.show(*tables(results or run.collect(measured(options))))


def measured(options: argparse.Namespace) -> Iterator[Result]:
    """Train, fit and judge everything for each of the seeds, which are those of the adapters and of the order."""
    bfloat16 = torch.bfloat16
    tokenizer, model = language_model(options.base, bfloat16) if options.base else smollm2(bfloat16)
    model.to(options.device)
    data = _Data(tokenizer, model, options)
    answers = [tokenizer(word).input_ids[0] for word in ANSWERS]
    upper = UpperLayers(model, options.first_layer, answers)

    def adapted(seed: int, dropout: float = 0.0) -> nn.Module:
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, target_modules=["q_proj", "v_proj"])
        return peft.get_peft_model(copy.deepcopy(upper), config)

    members = {}
    for seed in options.seeds:
        members[seed] = trained(lambda seed=seed: adapted(seed), data, options, f"lora-{seed}")  # type: ignore[misc]
        makers = _rows(*members[seed], lambda seed=seed: adapted(seed, dropout=0.1), data, options, seed)  # type: ignore[misc]
        for name, make in track(makers.items(), f"seed {seed}"):
            if any(fnmatch(name, pattern) for pattern in options.rows):
                yield data.judged(name, make(), seed)
    if len(members) > 1 and any(fnmatch(ENSEMBLE, pattern) for pattern in options.rows):
        networks = [model for _, model in members.values()]
        yield data.judged(ENSEMBLE, lambda x: torch.stack([network(*x).softmax(-1) for network in networks]), 0)


class _Data:
    """Sentences to train on, others to fit on, those of dev and the news to be judged on."""

    def __init__(self, tokenizer: Any, model: Any, options: argparse.Namespace) -> None:
        def read(rows: list[tuple[str, int]], batch_size: int) -> Texts:
            prompts = [(PROMPT.format(text), label) for text, label in rows]
            return texts(tokenizer, model, options.first_layer, prompts, batch_size)

        with zipfile.ZipFile(in_folder(options.data, "sst2.zip")) as archive:
            train, dev = (sentences(archive.read(name).decode()) for name in ("train.tsv", "dev.tsv"))
            news = list(csv.reader(io.StringIO(archive.read("ag_news_small.csv").decode())))
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
        held_out = [train[i] for i in order[options.train : options.train + options.fitting]]
        self.train = read([train[i] for i in order[: options.train]], 8)
        self.fitting = read(held_out, 50)
        self.dev = read(dev[: options.dev], 50)
        self.other = read([(_shortened(f"{row[1]}. {row[2]}"), 0) for row in news[: options.news]], 50)

    @torch.no_grad()
    def judged(self, name: str, predict: Predict, seed: int) -> Result:
        """Score the average of the networks, and its entropy and mutual information as signs of other text."""
        usual, unusual = (torch.cat([predict(x) for x, _ in part.batches], 1) for part in (self.dev, self.other))
        others: dict[str, float] = {}
        for count in (1, 3, 5, 10, 20):
            if 1 < len(usual) >= count:
                mean = usual[:count].mean(0)
                others[f"NLL of {count}"] = F.nll_loss(mean.clamp_min(1e-30).log(), self.dev.labels).item()
                others[f"ECE of {count}"] = calibration_error(mean, self.dev.labels)
        scores_in, scores_out = _signs(usual), _signs(unusual)
        for sign in scores_in:
            values = torch.cat([scores_in[sign], scores_out[sign]])
            if values.max() > 1e-6:  # one network has no mutual information
                labels = torch.cat([torch.zeros(len(scores_in[sign])), torch.ones(len(scores_out[sign]))]).long()
                others[sign] = 100 * binary_auroc(values / values.max(), labels).item()
        return Result("dev", name, evaluate(usual.mean(0), self.dev.labels), seed, others)


def _rows(
    early: nn.Module,
    model: nn.Module,
    with_dropout: Callable[[], nn.Module],
    data: _Data,
    options: argparse.Namespace,
    seed: int,
) -> dict[str, Callable[[], Predict]]:
    """How to make each of the ways to predict, by name; nothing is fitted on what is judged."""
    rotated = copy.deepcopy(model)
    bnnify.orthogonalize_adapters(rotated)

    def tuned(labels: bool, select: str = A_AND_B, of: nn.Module = rotated, **rule: Any) -> bnnify.BayesianModel:
        bnn = bnnify.convert(of, select=select, **rule)
        batches = data.fitting.batches
        bnnify.tune_std(bnn, batches, likelihood="logits", labels=labels, num_samples=options.tuning_samples)
        return bnn

    @cache
    def tuned_with_labels() -> bnnify.BayesianModel:
        return tuned(True)

    def of_temperature() -> Predict:
        with torch.no_grad():
            logits = torch.cat([model(*x) for x, _ in data.fitting.batches])
        temperature = fit_temperature(logits, data.fitting.labels)
        return lambda x: (model(*x) / temperature).softmax(-1)[None]

    def fisher() -> bnnify.FisherStd:
        return bnnify.FisherStd.estimate(
            model, data.fitting.batches, likelihood="logits", num_data=options.train, chunk_size=1
        )

    def sampled(make: Callable[[], bnnify.BayesianModel]) -> Callable[[], Predict]:
        return lambda: _sampled(make().eval(), options.samples)

    def dropped() -> Predict:
        _, network = trained(with_dropout, data, options, f"dropout-{seed}")
        return _dropout(network, options.samples)

    return {
        "LoRA": lambda: lambda x: model(*x).softmax(-1)[None],
        "LoRA, epoch of the best held-out NLL": lambda: lambda x: early(*x).softmax(-1)[None],
        "LoRA, temperature, labels": of_temperature,
        "MC dropout": dropped,
        "bnnify, as converted": sampled(lambda: bnnify.convert(rotated, select=A_AND_B)),
        "bnnify, tuned, labels": sampled(tuned_with_labels),
        "bnnify, tuned, then the ELBO": sampled(lambda: finetuned(copy.deepcopy(tuned_with_labels()), data, options)),
        "bnnify, tuned, no labels": sampled(lambda: tuned(False)),
        "bnnify, A alone, tuned, labels": sampled(lambda: tuned(True, A)),
        "bnnify, not rotated, tuned, labels": sampled(lambda: tuned(True, of=model)),
        "rule of TFB, A alone, no labels": sampled(lambda: tuned(False, A, posterior_std=_noise_of_one_size(rotated))),
        "rule of TFB, A alone, labels": sampled(lambda: tuned(True, A, posterior_std=_noise_of_one_size(rotated))),
        "constant σ, labels": sampled(lambda: tuned(True, of=model, posterior_std=0.01)),
        "FisherStd, labels": sampled(lambda: tuned(True, of=model, posterior_std=fisher())),
    }


def trained(
    make: Callable[[], nn.Module], data: _Data, options: argparse.Namespace, name: str
) -> tuple[nn.Module, nn.Module]:
    """Train adapters by the likelihood; return them after the epoch with the best held-out NLL, and at the end."""
    model = make()
    file = options.cache / f"{name}-{options.train}-{options.epochs}.pt" if options.cache else None
    if file and file.exists():
        both = (model, copy.deepcopy(model))
        for each, state in zip(both, torch.load(file, map_location=options.device), strict=True):
            peft.set_peft_model_state_dict(each, state)
            each.eval()
        return both
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], options.lr, weight_decay=0.0)
    best, early = float("inf"), model
    for _ in _epochs(model, optimizer, data, options.epochs, lambda model, x, y: F.cross_entropy(model(*x), y)):
        with torch.no_grad():
            logits = torch.cat([model(*x) for x, _ in data.fitting.batches])
        held_out = F.cross_entropy(logits, data.fitting.labels).item()
        if held_out < best:
            best, early = held_out, copy.deepcopy(model)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save([peft.get_peft_model_state_dict(each) for each in (early, model)], file)
    return early, model


def finetuned(bnn: bnnify.BayesianModel, data: _Data, options: argparse.Namespace) -> bnnify.BayesianModel:
    """Train means and ρ by the ELBO, whose data are the sentences: each has one answer."""

    def loss(model: Any, x: Any, y: Tensor) -> Tensor:
        logits, kl = model(*x)
        return bnnify.elbo(F.cross_entropy(logits, y), kl, num_data=options.train)

    optimizer = torch.optim.Adam(bnn.parameter_groups(lr=options.elbo_lr, rho_lr=1e-2))
    for _ in _epochs(bnn, optimizer, data, options.elbo_epochs, loss):
        pass
    return bnn


def _epochs(model: nn.Module, optimizer: Any, data: _Data, epochs: int, loss: Callable[..., Tensor]) -> Iterator[int]:
    """Train for some epochs, with 20 steps of warm-up and a linear decay; in eval mode between them and afterwards."""
    steps = epochs * len(data.train.batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / steps))
    for epoch in range(epochs):
        model.train()
        for number in torch.randperm(len(data.train.batches)).tolist():
            optimizer.zero_grad()
            loss(model, *data.train.batches[number]).backward()
            optimizer.step()
            schedule.step()
        model.eval()
        yield epoch


def _sampled(bnn: bnnify.BayesianModel, samples: int) -> Predict:
    """Every batch sees the same networks."""

    def predict(x: Any) -> Tensor:
        torch.manual_seed(1)
        return bnn.sample(*x, num_samples=samples).softmax(-1)

    return predict


def _dropout(model: nn.Module, samples: int) -> Predict:
    def predict(x: Any) -> Tensor:
        torch.manual_seed(1)
        model.train()
        return torch.stack([model(*x).softmax(-1) for _ in range(samples)])

    return predict


def _noise_of_one_size(rotated: nn.Module) -> dict[str, bnnify.distributions.initial_std.Constant]:
    """σ of each A such that the noise of ΔW has one size in all layers, in all directions of B's columns.

    Training-Free Bayesianization (Shi et al. 2024) takes B = U·diag(d) and gives row i of A the σ of σ_q/d_i; with
    B = β·U, as the rotated adapters have it, that is σ_q/β for all rows.
    """
    pairs = adapter_pairs(rotated)
    return {pair.names[0]: Constant(0.01 * len(pair.down) ** 0.5 / pair.up.norm().item()) for pair in pairs}


def _signs(probabilities: Tensor) -> dict[str, Tensor]:
    mean = probabilities.mean(0)
    entropy = torch.special.entr(mean).sum(-1)
    information = entropy - torch.special.entr(probabilities).sum(-1).mean(0)
    return {"entropy": entropy, "mutual information": information.clamp_min(0)}


def sentences(table: str) -> list[tuple[str, int]]:
    rows = (line.rsplit("\t", 1) for line in table.splitlines()[1:])
    return [(text.strip(), int(label)) for text, label in rows]


def _shortened(text: str) -> str:
    return " ".join(text.replace("\\", " ").split()[:OTHER_WORDS])


def _read(file: Path) -> Iterator[Result]:
    for entry in json.loads(file.read_text())["results"]:
        yield Result(**entry | {"metrics": Metrics(**entry["metrics"])})


def tables(results: list[Result]) -> Iterator[Table]:
    """One table of scores, and one of how they change with the number of networks."""
    groups = {name: runs for (_, name), runs in grouped(results).items()}
    headings = ["network", "accuracy %", "NLL", "ECE", "AUROC %,\nentropy", "AUROC %,\nmutual information"]

    def cell(runs: list[Result], key: str, places: int) -> str:
        values = [run.others[key] for run in runs if key in run.others]
        return spread(values, places) if values else ""

    yield Table(
        "SST-2, the sentences of dev; AUROC: news of AG News told from them (the max-probability ranks as the entropy)",
        headings,
        [
            [
                name,
                *score_cells(runs, interval=False),
                *(cell(runs, key, 1) for key in ("entropy", "mutual information")),
            ]
            for name, runs in groups.items()
        ],
    )
    counts = [count for count in (1, 3, 5, 10, 20) if any(f"NLL of {count}" in run.others for run in results)]
    yield Table(
        "NLL / ECE of the average of the first K networks",
        ["network", *(f"K = {count}" for count in counts)],
        [
            [name, *(" / ".join(cell(runs, f"{score} of {count}", 3) for score in ("NLL", "ECE")) for count in counts)]
            for name, runs in groups.items()
            if any(f"NLL of {counts[-1]}" in run.others for run in runs)
        ],
    )


def _options() -> argparse.Namespace:
    parser = report.parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder with sst2.zip")
    parser.add_argument("--base", type=Path, help="the folder of another Llama, instead of SmolLM2-135M")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cache", type=Path, help="where to keep the trained adapters")
    parser.add_argument("--merge", type=Path, nargs="+", default=[], help="print the tables of these results instead")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", default=ROWS, help="globs of the names of rows; * for the rules of σ too")
    parser.add_argument("--first-layer", type=int, default=20, help="of 30: adapters are in this layer and above")
    parser.add_argument("--train", type=int, default=1000, help="sentences to train on")
    parser.add_argument("--fitting", type=int, default=200, help="other sentences, to fit a temperature or σ on")
    parser.add_argument("--dev", type=int, default=872, help="sentences of dev to be judged on")
    parser.add_argument("--news", type=int, default=200, help="news of AG News")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--elbo-epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--elbo-lr", type=float, default=2e-4)
    parser.add_argument("--samples", type=int, default=10, help="K, the number of networks")
    parser.add_argument("--tuning-samples", type=int, default=10, help="networks for each factor on σ that is tried")
    return parser.parse_args()


if __name__ == "__main__":
    main()
