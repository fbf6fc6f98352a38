"""The predictive distribution: averages over networks from the posterior, and the uncertainty that they show."""

__all__ = ["predict"]

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from .averages import Averages, Prediction, concatenate
from .batches import as_arguments, check_num_samples, first_of
from .eval_mode import evaluating
from .likelihood import Likelihood
from .passes import passes

if TYPE_CHECKING:
    from .model import BayesianModel


def predict(
    bnn: "BayesianModel",
    inputs: Any,
    num_samples: int = 32,
    *,
    likelihood: Likelihood = "values",
    output: str | int | Callable[[Any], Any] | None = None,
    class_dim: int = -1,
    antithetic: bool = False,
    pure: bool = False,
    progress: bool = False,
) -> Prediction:
    """The predictive distribution of ``bnn`` for ``inputs``, in eval mode, without gradient, and in constant memory.

    It is what ``num_samples`` rounds of ``with bnn.draw(): bnn.module(x)`` give, under the same seed where the batches
    take less than 256 MiB together. All the batches of a loader, which is read once, are seen by the same networks.
    The forward runs once for each network and batch. Where every layer is one of torch, torchvision, timm or
    transformers as published, what comes before the Bayesian weights is computed once for each batch.

    ``likelihood`` says what the model's output means:

    ===================  ==========================================================================================
    ``"values"``         any numbers; they are averaged as they are
    ``"logits"``         unnormalised log probabilities of classes along ``class_dim``
    ``"probabilities"``  probabilities of classes along ``class_dim``
    ``"binary_logits"``  independent logits of yes/no questions
    ``"gaussian"``       a pair (mean, variance) of a regression that predicts its own noise
    ===================  ==========================================================================================

    Args:
        bnn: The converted model.
        inputs: A batch (a tensor; a tuple of arguments; a mapping of keyword arguments), or a ``DataLoader``. Of a
            loader's batches that are lists or tuples the first element is the input, and results are concatenated.
        num_samples: K, the number of networks. Default: ``32``.
        likelihood: See above. Default: ``"values"``.
        output: Which part of the model's output: a key or attribute, an index, or a function. Default: all of it.
        class_dim: The dimension of the classes. Default: ``-1``; segmentation models usually have it at ``1``.
        antithetic: Draw the networks in pairs with the noise ε and -ε. The mean stays unbiased, and where the output is
            nearly linear in the weights it is far more precise, so that ``std / √K`` is no longer its error. ``std``
            and the mutual information gain nothing: if the outputs of a pair have the correlation c, the variance
            that ``std`` is the root of is on average ``(K - 1 - c) / (K - 1)`` times the true one. For c < 0 that is
            too wide, by at most the factor ``K / (K - 1)``, and never too narrow. Of an odd K the last network has no
            partner. Default: ``False``.
        pure: Take the forward of a model of your own, too, for a function of its arguments, tensors and torch's random
            numbers alone: without other random numbers, and without anything that it keeps from call to call outside of
            tensors. Then its part before the Bayesian weights is computed once for each batch as well. Default:
            ``False``.
        progress: Show a progress bar, which needs rich, from the extra ``cli``. Default: ``False``.

    Raises:
        ValueError: ``num_samples`` is not positive, ``likelihood`` is unknown, or the loader has no batches.
        TypeError: The chosen output is not a tensor (or, for ``"gaussian"``, a pair of tensors).
        ImportError: ``progress`` was asked for, and rich is not installed.

    References:
        Depeweg et al. 2018, "Decomposition of Uncertainty in Bayesian Deep Learning", eq. 3 (the entropies) and eq. 5.
    """
    check_num_samples(num_samples)
    if likelihood not in Likelihood.__args__:  # type: ignore[attr-defined]
        raise ValueError(f"Unknown likelihood {likelihood!r}: known are {', '.join(map(repr, Likelihood.__args__))}.")  # type: ignore[attr-defined]
    averages: list[Averages] = []
    with evaluating(bnn), torch.no_grad(), _bar(num_samples, inputs, progress) as advance:
        batches = _batches(bnn, inputs)
        for index, found in passes(bnn.module, batches, num_samples, output=output, antithetic=antithetic, pure=pure):
            if index == len(averages):
                averages.append(Averages(likelihood, class_dim))
            averages[index].add(found)
            advance()
    return concatenate([average.prediction() for average in averages])


def _batches(bnn: "BayesianModel", inputs: Any) -> Iterator[tuple[tuple[Any, ...], Mapping[str, Any]]]:
    if not isinstance(inputs, DataLoader):
        yield as_arguments(inputs)
        return
    device = next(bnn.parameters()).device
    for batch in inputs:
        yield as_arguments(first_of(batch, device))


@contextmanager
def _bar(num_samples: int, inputs: Any, wanted: bool) -> Iterator[Callable[[], None]]:
    """What is called after each forward, to move a progress bar on."""
    if not wanted:
        yield lambda: None
        return
    try:
        from rich.progress import Progress
    except ImportError as error:
        raise ImportError("predict(progress=True) needs rich: pip install 'bnnify[cli]', or leave it out.") from error
    try:
        total: int | None = num_samples * (len(inputs) if isinstance(inputs, DataLoader) else 1)
    except TypeError:  # a loader over a stream
        total = None
    with Progress() as progress:
        task = progress.add_task("predicting", total=total)
        yield lambda: progress.advance(task)
