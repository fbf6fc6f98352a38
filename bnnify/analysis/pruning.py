"""Prune by signal-to-noise: set the weights with the least ``|μ|/σ`` to zero for good."""

__all__ = ["PruningEntry", "PruningReport", "prune", "signal_to_noise", "signal_to_noise_of"]

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..distributions.gaussian import PRUNED, at_least_float32, is_pruned, std
from ..draws.sharding import in_form_of, whole
from ..errors import ArgumentError, check_module
from ..model import BayesianModel
from ..modules.parameters import BayesianParameter, bayesian_parameters, unique_bayesian_parameters


@dataclass(frozen=True)
class PruningEntry:
    """One Bayesian parameter: its name, the number of its weights, and the number of those that are pruned."""

    name: str
    numel: int
    pruned: int


@dataclass(frozen=True)
class PruningReport:
    """The pruned weights of a model after :func:`prune`; printing it gives a table.

    Attributes:
        entries: One entry for each parameter whose posterior has a σ; a tied one appears once.
    """

    entries: tuple[PruningEntry, ...]

    @property
    def numel(self) -> int:
        """The number of weights that could be pruned."""
        return sum(entry.numel for entry in self.entries)

    @property
    def pruned(self) -> int:
        """The number of weights that are pruned."""
        return sum(entry.pruned for entry in self.entries)

    @property
    def fraction(self) -> float:
        """Their share, from 0 to 1."""
        return self.pruned / max(self.numel, 1)

    def __str__(self) -> str:
        width = max((len(entry.name) for entry in self.entries), default=0)
        rows = [
            f"{entry.name.ljust(width)}  {entry.pruned:>11,} of {entry.numel:>11,}  {entry.pruned / entry.numel:7.2%}"
            for entry in self.entries
        ]
        return "\n".join([*rows, f"{self.pruned:,} of {self.numel:,} Bayesian weights pruned ({self.fraction:.2%})"])


def signal_to_noise(bnn: nn.Module) -> dict[str, Tensor]:
    """``|μ|/σ`` of every Bayesian weight, in float32 or better and of the parameter's shape, by its name.

    It is 0 for a pruned weight and infinite for another one whose σ underflows. Parameters whose posterior is a point
    are left out; a tied one appears under the first of its names.

    References:
        Blundell et al. 2015, "Weight Uncertainty in Neural Networks", section 5.1.
    """
    return {parameter.name: signal_to_noise_of(parameter) for parameter in _prunable(_root(bnn))}


def prune(bnn: nn.Module, fraction: float, *, per_layer: bool = False) -> PruningReport:
    """Set the ``fraction`` of the Bayesian weights with the least ``|μ|/σ`` to zero, in place, for good.

    A pruned weight has μ = 0 and σ = 0 exactly, in every draw and in the collapsed model. It gets no gradient and does
    not count in the KL, so that fine-tuning leaves it at zero; its ρ tells that it is pruned, also in a file. Weights
    that were pruned before count towards the fraction.

    A sharded model (FSDP2, tensor parallelism) has to be pruned by all ranks together; each holds the ratios of the
    whole model, in the memory of its CPU, until that is done.

    Make a new optimizer before fine-tuning: one with momentum would go on moving what it moved before.

    Args:
        bnn: A converted model, which is changed.
        fraction: The least share of all Bayesian weights (and biases) that is pruned afterwards, from 0 to 1.
        per_layer: Prune this fraction of each parameter, rather than that of all together. Default: ``False``.

    Returns:
        How many weights of each parameter are pruned now.

    Raises:
        ArgumentTypeError: ``bnn`` is no module.
        ArgumentError: The fraction is not between 0 and 1, the model is not converted, or a parameter is on the meta
            device. Nothing has been pruned then.

    References:
        Blundell et al. 2015, "Weight Uncertainty in Neural Networks", section 5.1.

    Example::

        >>> print(bnnify.prune(bnnify.convert(nn.Linear(4, 5, bias=False)), 0.75))
        weight           15 of          20   75.00%
        15 of 20 Bayesian weights pruned (75.00%)
    """
    if isinstance(fraction, bool) or not (isinstance(fraction, (int, float)) and 0 <= fraction <= 1):
        raise ArgumentError(f"prune(fraction) must lie between 0 and 1, not {fraction!r}.")
    parameters = _prunable(_root(bnn))
    for parameter in parameters:
        if parameter.mean.is_meta:
            raise ArgumentError(
                f"Cannot prune `{parameter.name}`: it is on the meta device. Prune a model with all its values."
            )
    groups = [[parameter] for parameter in parameters] if per_layer else [parameters]
    for group in groups:
        _prune_together(group, fraction)
    entries = [PruningEntry(p.name, p.mean.numel(), int(whole(is_pruned(p.rho).sum()))) for p in parameters]
    for parameter, entry in zip(parameters, entries, strict=True):
        parameter.slot.state.has_pruned = entry.pruned > 0
    return PruningReport(tuple(entries))


@torch.no_grad()
def _prune_together(parameters: list[BayesianParameter], fraction: float) -> None:
    if not parameters:
        return
    # What was pruned before comes first, so that pruning a second time does not begin anew.
    ratios = [whole(signal_to_noise_of(p).masked_fill(is_pruned(p.rho), -1.0)).flatten().cpu() for p in parameters]
    least = _least(torch.cat(ratios), fraction)
    for parameter, chosen in zip(parameters, least.split([len(ratio) for ratio in ratios]), strict=True):
        chosen = in_form_of(parameter.mean, chosen.view(parameter.mean.shape).to(parameter.mean.device))
        parameter.mean.masked_fill_(chosen, 0.0)
        parameter.rho.masked_fill_(chosen, PRUNED)


def _least(ratios: Tensor, fraction: float) -> Tensor:
    """Mark exactly the least ``fraction`` of ``ratios``, of equal ones the first."""
    count = round(fraction * len(ratios))
    if count == 0:
        return torch.zeros_like(ratios, dtype=torch.bool)
    threshold = ratios.kthvalue(count).values  # to sort hundreds of millions would take minutes
    least = ratios < threshold
    equal = (ratios == threshold).nonzero().flatten()
    least[equal[: count - int(least.sum())]] = True
    return least


@torch.no_grad()
def signal_to_noise_of(parameter: BayesianParameter) -> Tensor:
    """``|μ|/σ`` of the weights of one parameter; see :func:`signal_to_noise`."""
    ratio = at_least_float32(parameter.mean).abs() / std(at_least_float32(parameter.rho))
    return ratio.masked_fill(is_pruned(parameter.rho), 0.0).nan_to_num(nan=0.0, posinf=torch.inf)


def _prunable(root: nn.Module) -> list[BayesianParameter]:
    return [parameter for parameter in unique_bayesian_parameters(root) if parameter.has_rho]


def _root(bnn: nn.Module) -> nn.Module:
    check_module("The model", bnn)
    root = bnn.module if isinstance(bnn, BayesianModel) else bnn
    if not any(bayesian_parameters(root)):
        raise ArgumentError(f"{type(bnn).__name__} has no Bayesian parameters: bnnify.convert makes them.")
    return root
