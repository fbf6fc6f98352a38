"""The quantiles of σ and of signal-to-noise, and the KL, of each parameter."""

__all__ = ["QUANTILES", "ParameterSummary", "print_table", "summarize"]

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributions.gaussian import at_least_float32, is_pruned, std
from ..errors import needing
from ..model import BayesianModel
from ..modules.parameters import unique_bayesian_parameters
from .pruning import signal_to_noise_of

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class ParameterSummary:
    """One Bayesian parameter: how many of its weights are pruned, its settings, and the summed KL in nats.

    ``std`` and ``signal_to_noise`` are the quantiles of σ and of ``|μ|/σ`` at :data:`QUANTILES`; None without a σ.
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    pruned: int
    settings: str
    std: tuple[float, ...] | None
    signal_to_noise: tuple[float, ...] | None
    kl: float


@torch.no_grad()
def summarize(bnn: BayesianModel) -> list[ParameterSummary]:
    """Summarise every Bayesian parameter of a converted model, a tied one once.

    A Monte Carlo estimate of a KL is that of one draw, the same at every call.
    """
    summaries = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in unique_bayesian_parameters(bnn.module):
            point = not parameter.has_rho
            summaries.append(
                ParameterSummary(
                    name=parameter.name,
                    shape=tuple(parameter.mean.shape),
                    numel=parameter.mean.numel(),
                    pruned=0 if point else int(is_pruned(parameter.rho).sum()),
                    settings=str(parameter.settings),
                    std=None if point else _quantiles(std(at_least_float32(parameter.rho))),
                    signal_to_noise=None if point else _quantiles(signal_to_noise_of(parameter)),
                    kl=parameter.kl().item(),
                )
            )
    return summaries


def print_table(summaries: Sequence[ParameterSummary], title: str) -> None:
    """Print a table of the parameters; it needs rich.

    Raises:
        MissingLibraryError: It is not installed.
    """
    with needing("rich", "The table"):
        from rich.console import Console
        from rich.table import Table
    any_pruned = any(summary.pruned for summary in summaries)
    table = Table(caption="quantiles 5, 50 and 95 %; KL in nats", box=None, padding=(0, 2, 0, 0))
    table.add_column("parameter", overflow="fold")  # names that were cut could not be told apart
    for heading in ("shape", *(["pruned"] if any_pruned else []), "σ", "|μ|/σ", "KL"):
        table.add_column(heading, justify="right", no_wrap=True)

    def add_row(name: str, shape: str, numel: int, pruned: int, *others: str) -> None:
        table.add_row(name, shape, *([f"{pruned / max(numel, 1):.1%}"] if any_pruned else []), *others)

    for each in summaries:
        shape = "×".join(map(str, each.shape))
        figures = (_shown(each.std), _shown(each.signal_to_noise), _nats(each.kl))
        add_row(each.name, shape, each.numel, each.pruned, *figures)
    numel, pruned, kl = (sum(getattr(each, field) for each in summaries) for field in ("numel", "pruned", "kl"))
    table.add_section()
    add_row("all", f"{numel:,}", numel, pruned, "", "", _nats(kl))
    # A pipe has no width.
    console = Console(width=None if sys.stdout.isatty() else 10_000)
    console.print(title, highlight=False, markup=False)
    console.print(table)


def _quantiles(values: Tensor) -> tuple[float, ...]:
    # torch.quantile takes no more than 16 million values.
    ordered = values.flatten().sort().values
    return tuple(ordered[round(q * (len(ordered) - 1))].item() for q in QUANTILES)


def _shown(quantiles: tuple[float, ...] | None) -> str:
    """The quantiles 5, 50 and 95 %, or one number if they are all the same."""
    texts = [f"{quantiles[i]:.2g}" for i in (0, 2, 4)] if quantiles is not None else ["none"]
    return " ".join(texts if len(set(texts)) > 1 else texts[:1])


def _nats(kl: float) -> str:
    return f"{kl:,.1f}" if kl < 1000 else f"{kl:,.0f}"
