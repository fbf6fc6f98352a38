"""What the networks, and the one at the posterior mean, say about data, and how probable the targets are to them."""

__all__ = ["Outcomes", "outcomes_of"]

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, check_tensor
from ..model import BayesianModel
from ..prediction.averages import Averages, Prediction, concatenate
from ..prediction.batches import Arguments, batches_of, called_with, choose, labelled_batches_of, rows_of
from ..prediction.eval_mode import evaluating
from ..prediction.likelihood import Likelihood
from ..prediction.loop import run_networks
from ..prediction.sampler import mean_draw
from ..training.targets import log_prob_of


@dataclass(frozen=True)
class Outcomes:
    """Predictions and targets, in the order of the data: a datum is a class, an answer or a number that was predicted.

    Attributes:
        prediction: Its mean has the shape (M,), or (M, classes).
        targets: Shape (M,).
        log_prob: log p(y|x) of each, in float64.
        examples: To which example each belongs; its pixels or tokens go together.
        energy: -log Σ exp(logits) of the network at the posterior mean, where there are logits.
    """

    prediction: Prediction
    targets: Tensor
    log_prob: Tensor
    examples: Tensor
    energy: Tensor | None = None


def outcomes_of(
    bnn: BayesianModel,
    data: Any,
    likelihood: Likelihood,
    *,
    output: str | int | Callable[[Any], Any] | None,
    num_samples: int,
    seed: int,
    labelled: bool = True,
    advance: Callable[[], object] = lambda: None,
) -> tuple[Outcomes, Outcomes]:
    """Read data once, and run the network at the posterior mean and ``num_samples`` others on them.

    Returns:
        The outcomes of the posterior mean, and those of the average over the networks. Without labels their targets are
        zeros.

    Raises:
        ArgumentError: There are no data, or nothing counts; targets do not fit the outputs, or outputs the likelihood.
        ArgumentTypeError: It is not clear what of the data are inputs, or a target is no tensor.
    """
    module = bnn.module
    alone, together = list[_Batch](), list[_Batch]()
    at_mean = mean_draw(module)

    def batches() -> Iterator[Arguments]:
        pairs = (
            labelled_batches_of(data, module, "evaluate") if labelled else ((a, None) for a in batches_of(data, module))
        )
        for arguments, target in pairs:
            args, kwargs = arguments
            with at_mean, called_with(module, arguments):
                found = choose(module(*args, **kwargs), output)
            alone.append(_Batch(likelihood, rows_of(arguments), target, of_mean=True))
            alone[-1].add(found)
            together.append(_Batch(likelihood, rows_of(arguments), target))
            yield arguments

    with evaluating(module), torch.no_grad():
        for index, found in run_networks(module, batches(), range(num_samples), output=output, seed=seed):
            together[index].add(found)
            del found
            advance()
    if not alone:
        raise ArgumentError("evaluate was given a loader without batches.")
    return _joined(alone), _joined(together)


class _Batch:
    """The outcomes of one batch, from outputs that are added one by one."""

    def __init__(self, likelihood: Likelihood, rows: int | None, target: Any, of_mean: bool = False) -> None:
        self._likelihood, self._rows, self._target, self._of_mean = likelihood, rows, target, of_mean
        self._averages = Averages(likelihood, rows)
        self._log_prob: Any = None
        self._energy: Tensor | None = None
        self._count = 0

    def add(self, found: Any) -> None:
        self._averages.add(found)
        if self._target is not None:
            distribution = self._likelihood.distribution(found, self._rows)
            if distribution.event_shape:
                raise ArgumentError(
                    f"evaluate is for distributions of single numbers, and likelihood= made a "
                    f"{type(distribution).__name__} over {tuple(distribution.event_shape)}. Leave out Independent, or "
                    "what joins the numbers."
                )
            check_tensor("evaluate: a target", self._target, "Make the batches (inputs, torch.as_tensor(target)).")
            if self._count == 0 and not self._likelihood.is_discrete and not self._target.isfinite().all():
                raise ArgumentError("evaluate: a target is not finite. Leave such data out.")
            found_log_prob = log_prob_of(self._target, distribution, self._likelihood.ignore_index, "evaluate")
            self._log_prob = found_log_prob if self._count == 0 else torch.logaddexp(self._log_prob, found_log_prob)
        if self._of_mean:
            self._energy = self._likelihood.energy(self._likelihood.parts(found))
        self._count += 1

    def outcomes(self) -> Outcomes:
        """The outcomes on the CPU; their examples are counted from 0."""
        prediction = self._averages.prediction()
        entropy = prediction.predictive_entropy
        target = torch.zeros((prediction.mean if entropy is None else entropy).shape, device="cpu")
        counts = torch.ones_like(target, dtype=torch.bool)
        if self._target is not None:
            target = self._target
            counts = counts if entropy is None else target != self._likelihood.ignore_index
        each = target[:1].numel()
        examples = torch.arange(len(target), device="cpu").repeat_interleave(each)[counts.flatten().cpu()]

        def flat(values: Any) -> Any:
            return None if values is None else values[counts.to(values.device)].cpu()

        def of_mean(values: Tensor) -> Any:
            return flat(values if prediction.class_dim is None else values.movedim(prediction.class_dim, -1))

        log_prob = torch.zeros(len(examples), device="cpu") if self._log_prob is None else self._log_prob.cpu()
        return Outcomes(
            replace(
                prediction,
                mean=of_mean(prediction.mean),
                std=of_mean(prediction.std),
                predictive_entropy=flat(prediction.predictive_entropy),
                expected_entropy=flat(prediction.expected_entropy),
                aleatoric_std=flat(prediction.aleatoric_std),
                class_dim=None if prediction.class_dim is None else -1,
            ),
            flat(target),
            log_prob - torch.tensor(float(self._count), dtype=log_prob.dtype, device="cpu").log(),
            examples,
            flat(self._energy),
        )


def _joined(batches: list[_Batch]) -> Outcomes:
    found = [batch.outcomes() for batch in batches]
    if not any(len(each.targets) for each in found):
        raise ArgumentError("evaluate: no target counts; all are ignored or empty.")
    numbered = [torch.stack([torch.full_like(e.examples, n), e.examples], -1) for n, e in enumerate(found)]
    energies = [each.energy for each in found if each.energy is not None]
    return Outcomes(
        concatenate([each.prediction for each in found], [len(each.targets) for each in found]),
        torch.cat([each.targets for each in found]),
        torch.cat([each.log_prob for each in found]),
        torch.unique_consecutive(torch.cat(numbered), return_inverse=True, dim=0)[1],
        torch.cat(energies) if energies else None,
    )
