"""How many observations 90 % intervals of a regression hold, by prior and β, on diabetes and on a noisy sine."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from statistics import fmean
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

import bnnify

from ..harness import report
from ..harness.fit import fit, shuffled
from ..harness.progress import track
from ..harness.report import Run, Table

PRIORS = {
    "default": None,
    'Pretrained(std="learned")': bnnify.Pretrained(std="learned"),
    "Gaussian(std=1.0)": bnnify.Gaussian(std=1.0),
}
BETAS = (1.0, 0.1, 0.01)
METRICS = ("RMSE", "NLL", "CRPS", "90 % coverage", "90 % width")
Data: TypeAlias = tuple[Tensor, Tensor]


def main() -> None:
    options = _options()
    run = Run(options, ["torch", "scikit-learn"])
    results = run.collect(compare(options))
    keys = list(dict.fromkeys((each["data"], each["prior"], each["beta"]) for each in results))
    rows, shown = [], None
    for key in keys:
        found = [each for each in results if (each["data"], each["prior"], each["beta"]) == key]
        if key[0] != shown:
            shown = key[0]
            rows.append([shown])
        figures = [f"{fmean(each[name] for each in found):.3f}" for name in (*METRICS, "noise", "conformal")]
        rows.append([key[1], str(key[2]), *figures])
    title = f"90 % intervals, means over {options.seeds} splits"
    run.show(Table(title, ["prior", "β", *METRICS, "learned noise", "conformal coverage"], rows, names=2))


def compare(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for seed in track(range(options.seeds)):
        for name, (make, pretraining) in {"diabetes": (diabetes, 100), "sine": (sine, 3000)}.items():
            torch.manual_seed(seed)
            train, held_out, test = make(seed)
            plain = trained(network(train[0].shape[1]), None, train, pretraining, 1.0)
            for prior, beta in ((prior, beta) for prior in PRIORS for beta in BETAS):
                torch.manual_seed(seed)
                start = copy.deepcopy(plain)
                bnn = bnnify.convert(start, prior=PRIORS[prior]) if PRIORS[prior] else bnnify.convert(start)
                nll = bnnify.GaussianNLL(std=0.5, learned=True)
                trained(bnn, nll, train, options.steps, beta)
                yield {"data": name, "prior": prior, "beta": beta, "seed": seed} | judged(bnn, nll, held_out, test)


def diabetes(seed: int) -> tuple[Data, Data, Data]:
    """Ten features of 442 patients and the progress of their disease, all with mean 0 and std 1: 250, 92 and 100."""
    from sklearn.datasets import load_diabetes

    data = load_diabetes()
    inputs, targets = torch.tensor(data.data).float(), torch.tensor(data.target).float()[:, None]
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    train = order[:250]
    inputs, targets = ((each - each[train].mean(0)) / each[train].std(0) for each in (inputs, targets))
    return tuple((inputs[part], targets[part]) for part in (train, order[250:342], order[342:]))  # type: ignore[return-value]


def sine(seed: int) -> tuple[Data, Data, Data]:
    """y = sin 3x + ε with ε of std 0.2, for x between -2 and 2: 300 points, 100 and 2,000."""
    generator = torch.Generator().manual_seed(seed)

    def points(number: int) -> Data:
        x = 4 * torch.rand(number, 1, generator=generator) - 2
        return x, (3 * x).sin() + 0.2 * torch.randn(number, 1, generator=generator)

    return points(300), points(100), points(2000)


def network(features: int) -> nn.Module:
    if features > 1:
        return nn.Sequential(nn.Linear(features, 50), nn.Tanh(), nn.Linear(50, 1))
    return nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))


def trained(model: nn.Module, nll: nn.Module | None, data: Data, steps: int, beta: float) -> nn.Module:
    """The model after training by the ELBO with the NLL, a plain one by the mean square error."""
    if isinstance(model, bnnify.BayesianModel) and nll is not None:
        groups = [*model.parameter_groups(lr=2e-3, rho_lr=1e-2), {"params": nll.parameters(), "lr": 1e-2}]
    else:
        groups = [{"params": model.parameters(), "lr": 2e-3}]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        if nll is None:
            return (model(inputs) - targets).square().mean()
        output, kl = model(inputs)
        return bnnify.elbo(nll(output, targets), kl, num_data=len(data[0]), beta=beta)

    fit(model, optimizer, data, shuffled(len(data[0]), 100, steps=steps), loss, schedule=schedule)
    return model


def judged(bnn: bnnify.BayesianModel, nll: Any, held_out: Data, test: Data) -> dict[str, float]:
    """The report card, the noise that was learned, and how much conformal intervals from held-out data cover."""
    found = bnnify.evaluate(bnn, [test], likelihood=nll, num_samples=50, bootstrap=0).rows["networks"]
    predictions = [bnn.predict(inputs, 50, likelihood=nll, seed=0) for inputs, _ in (held_out, test)]
    low, high = bnnify.ConformalIntervals.fit(predictions[0], held_out[1], coverage=0.9)(predictions[1])
    covered = ((low <= test[1]) & (test[1] <= high)).float().mean().item()
    return {name: found[name].value for name in METRICS} | {"noise": nll.std.item(), "conformal": covered}


def _options() -> argparse.Namespace:
    parser = report.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="splits, networks and trainings")
    parser.add_argument("--steps", type=int, default=1_500, help="batches of 100")
    return parser.parse_args()


if __name__ == "__main__":
    main()
