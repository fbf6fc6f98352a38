"""Held-out data, with or without labels, and how far networks are from what they say."""

__all__ = ["HeldOut", "Labelled", "Unlabelled"]

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution

from ..distributions.gaussian import at_least_float32
from ..errors import ArgumentError
from ..prediction.batches import Arguments, called_with, choose, rows_of
from ..prediction.likelihood import Likelihood
from ..prediction.loop import run_networks
from ..prediction.sampler import mean_draw
from .targets import log_prob_of

_TARGETS = 64
"""How many targets are drawn for each datum where not every target can be enumerated."""


class HeldOut(ABC):
    """A loss of averaged predictions, in nats per datum.

    Args:
        module: The model, in eval mode.
        batches: The arguments of its forward.
        likelihood: What its output means.
        output: Which part of its output, as in ``predict``.

    Attributes:
        num_data: The number of data that count.
        deterministic: The loss of the network at the posterior mean.
    """

    num_data = 0
    deterministic = 0.0

    def __init__(self, module: nn.Module, batches: Sequence[Arguments], likelihood: Likelihood, output: Any) -> None:
        self._module, self.batches, self._likelihood, self._output = module, batches, likelihood, output

    def loss(self, num_samples: int, advance: Callable[[], object] = lambda: None) -> float:
        """The loss of the average of ``num_samples`` networks, each drawn once for all data; infinite if no number."""
        sums: dict[int, Tensor] = {}
        for index, found in run_networks(self._module, self.batches, range(num_samples), output=self._output):
            log_probs = self._log_probs(index, self._distribution(index, found))
            sums[index] = torch.logaddexp(sums[index], log_probs) if index in sums else log_probs
            advance()
        return self._mean({index: total - math.log(num_samples) for index, total in sums.items()})

    @abstractmethod
    def _log_probs(self, index: int, distribution: Distribution) -> Tensor:
        """log p of what is looked at in batch ``index``, under one network."""

    @abstractmethod
    def _terms(self, index: int, log_probs: Tensor) -> Tensor:
        """The loss of each datum of batch ``index``, given log p of the averaged prediction."""

    def _mean(self, log_probs: Mapping[int, Tensor]) -> float:
        mean = torch.cat([self._terms(index, each) for index, each in log_probs.items()]).double().mean().item()
        return math.inf if math.isnan(mean) else mean

    def _mean_network(self) -> Iterator[tuple[int, Distribution]]:
        """Yield the number of each batch, and what the network at the posterior mean predicts for it."""
        draw = mean_draw(self._module)
        for index, (args, kwargs) in enumerate(self.batches):
            with draw, called_with(self._module, (args, kwargs)):
                found = choose(self._module(*args, **kwargs), self._output)
            yield index, self._distribution(index, found)

    def _distribution(self, index: int, found: Any) -> Distribution:
        return self._likelihood.distribution(found, rows_of(self.batches[index]))


class Labelled(HeldOut):
    """The NLL of targets, -log mean_k p(y|x, w_k).

    Raises:
        ArgumentError: No target counts.
    """

    def __init__(
        self,
        module: nn.Module,
        batches: Sequence[tuple[Arguments, Any]],
        likelihood: Likelihood,
        output: Any,
        ignore_index: int,
    ) -> None:
        super().__init__(module, [arguments for arguments, _ in batches], likelihood, output)
        self._targets = [target for _, target in batches]
        self._ignore_index = ignore_index
        plain = {index: self._log_probs(index, distribution) for index, distribution in self._mean_network()}
        self.num_data = sum(map(len, plain.values()))
        if not self.num_data:
            raise ArgumentError("tune_std: no target counts; all are ignored or empty.")
        self.deterministic = self._mean(plain)

    def _log_probs(self, index: int, distribution: Distribution) -> Tensor:
        return log_prob_of(self._targets[index], distribution, self._ignore_index)

    def _terms(self, index: int, log_probs: Tensor) -> Tensor:
        return -log_probs


class Unlabelled(HeldOut):
    """KL(p₀ ‖ mean_k p(·|x, w_k)), where p₀ is the prediction of the network at the posterior mean.

    It is exact for classes and yes/no answers. Otherwise it is the mean of r - 1 - log r over targets that are drawn
    here from p₀, for r = mean_k p(y|x, w_k) / p₀(y): never negative, right on average, and with far less noise than
    -log r itself (Schulman 2020, "Approximating KL Divergence").

    Raises:
        ArgumentError: There are no data, or p₀ is not a number.
    """

    def __init__(self, module: nn.Module, batches: Sequence[Arguments], likelihood: Likelihood, output: Any) -> None:
        super().__init__(module, batches, likelihood, output)
        self._drawn: dict[int, Tensor] = {}
        self._reference: list[Tensor] = []
        for index, distribution in self._mean_network():
            if not isinstance(distribution, (Categorical, Bernoulli)):
                self._drawn[index] = distribution.sample(torch.Size([_TARGETS]))
            self._reference.append(self._log_probs(index, distribution))
            self.num_data += distribution.batch_shape.numel()
        if not self.num_data:
            raise ArgumentError("tune_std: there are no data; all batches are empty.")
        if any(reference.isnan().any() for reference in self._reference):
            raise ArgumentError("tune_std: what the network at the posterior mean predicts is not a number in places.")

    def _log_probs(self, index: int, distribution: Distribution) -> Tensor:
        """log p of every target, along the last dimension, or of the drawn ones, along the first."""
        if isinstance(distribution, Categorical):
            return at_least_float32(distribution.logits)
        if isinstance(distribution, Bernoulli):
            logits = at_least_float32(distribution.logits)
            return torch.stack([F.logsigmoid(-logits), F.logsigmoid(logits)], -1)
        return distribution.log_prob(self._drawn[index]).double()

    def _terms(self, index: int, log_probs: Tensor) -> Tensor:
        reference = self._reference[index]
        if index in self._drawn:
            log_ratio = log_probs - reference
            return (log_ratio.expm1() - log_ratio).mean(0).flatten()
        products = reference.exp() * (reference - log_probs)
        return torch.where(reference > -math.inf, products, 0.0).sum(-1).flatten()  # 0 log 0 = 0
