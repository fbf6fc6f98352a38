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
from .pruning import signal_to_noise

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
    ratios = signal_to_noise(bnn)
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
                    signal_to_noise=None if point else _quantiles(ratios[parameter.name]),
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
    table = Table(title=title, caption="quantiles 5, 50 and 95 %; KL in nats")
    table.add_column("parameter")
    for heading in ("shape", "weights", "pruned", "σ", "|μ|/σ", "KL"):
        table.add_column(heading, justify="right")
    for summary in summaries:
        table.add_row(
            summary.name,
            "×".join(map(str, summary.shape)),
            f"{summary.numel:,}",
            f"{summary.pruned / summary.numel:.1%}",
            _shown(summary.std),
            _shown(summary.signal_to_noise),
            f"{summary.kl:,.1f}",
        )
    total = [sum(getattr(summary, field) for summary in summaries) for field in ("numel", "pruned", "kl")]
    table.add_section()
    table.add_row("all", "", f"{total[0]:,}", f"{total[1] / max(total[0], 1):.1%}", "", "", f"{total[2]:,.1f}")
    Console(soft_wrap=not sys.stdout.isatty()).print(table)


def _quantiles(values: Tensor) -> tuple[float, ...]:
    # torch.quantile takes no more than 16 million values.
    ordered = values.flatten().sort().values
    return tuple(ordered[round(q * (len(ordered) - 1))].item() for q in QUANTILES)


def _shown(quantiles: tuple[float, ...] | None) -> str:
    return "none" if quantiles is None else " ".join(f"{quantiles[i]:.2g}" for i in (0, 2, 4))
