"""The predictive distribution: averages over networks from the posterior, and the uncertainty that they show."""

__all__ = ["Likelihood", "Prediction", "check_num_samples", "predict"]

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .passes import passes
from .posterior import at_least_float32

if TYPE_CHECKING:
    from .model import BayesianModel

Likelihood = Literal["values", "logits", "probabilities", "binary_logits", "gaussian"]


@dataclass(frozen=True)
class Prediction:
    """The predictive distribution of a batch, from ``num_samples`` networks.

    All shapes are those of the model's output; where there are classes, entropies drop the class dimension.

    Attributes:
        mean: The predictive mean: mean class probabilities for a classifier, the mean value otherwise.
        std: The standard deviation over networks of what was averaged (epistemic spread; zero for a single sample).
        num_samples: The number of networks.
        predictive_entropy: H[E p(y|x, w)] in nats: the total uncertainty of a classification. None for values.
        expected_entropy: E H[p(y|x, w)] in nats: the part that every network agrees on (aleatoric). None for values.
        aleatoric_std: √E[σ²(x)], the noise that the networks predict, for ``likelihood="gaussian"``. None otherwise.
    """

    mean: Tensor
    std: Tensor
    num_samples: int
    predictive_entropy: Tensor | None = None
    expected_entropy: Tensor | None = None
    aleatoric_std: Tensor | None = None

    @property
    def mutual_information(self) -> Tensor | None:
        """I(y; w|x) = predictive_entropy - expected_entropy in nats: what the networks disagree on (epistemic)."""
        if self.predictive_entropy is None or self.expected_entropy is None:
            return None
        return (self.predictive_entropy - self.expected_entropy).clamp(min=0)

    @property
    def epistemic_std(self) -> Tensor:
        """The spread of the networks' means; the same as ``std``."""
        return self.std

    @property
    def total_std(self) -> Tensor:
        """√(epistemic² + aleatoric²), by the law of total variance."""
        return self.std if self.aleatoric_std is None else (self.std**2 + self.aleatoric_std**2).sqrt()


def predict(
    bnn: "BayesianModel",
    inputs: Any,
    num_samples: int = 32,
    *,
    likelihood: Likelihood = "values",
    output: str | int | Callable[[Any], Any] | None = None,
    class_dim: int = -1,
    antithetic: bool = False,
    progress: bool = False,
) -> Prediction:
    """The predictive distribution of ``bnn`` for ``inputs``, in eval mode, without gradient, and in constant memory.

    It is what ``num_samples`` rounds of ``with bnn.draw(): bnn.module(x)`` give under the same seed. All the batches of
    a loader, which is read once, are seen by the same networks. What does not depend on the Bayesian weights is
    computed once for each batch, where that is provably the same.

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
    averages: list[_Averages] = []
    several = isinstance(inputs, DataLoader)
    with evaluating(bnn), torch.no_grad(), _bar(num_samples, inputs, progress) as advance:
        outputs = passes(bnn.module, _batches(bnn, inputs), num_samples, antithetic=antithetic, several=several)
        with closing(outputs):  # which leaves its draw, also when something fails here
            for index, found in outputs:
                if index == len(averages):
                    averages.append(_Averages(likelihood, class_dim))
                averages[index].add(choose(found, output))
                advance()
    return _concatenate([average.prediction() for average in averages])


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


def check_num_samples(num_samples: int) -> None:
    """Raise a ValueError unless ``num_samples`` is a positive integer."""
    if not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"num_samples must be a positive integer, not {num_samples!r}.")


class _Averages:
    """What is kept of the outputs of the networks for one batch."""

    def __init__(self, likelihood: str, class_dim: int) -> None:
        self._likelihood = likelihood
        self._class_dim = class_dim
        self._values, self._entropies, self._variances = _Moments(), _Mean(), _Mean()

    def add(self, found: Any) -> None:
        likelihood, class_dim = self._likelihood, self._class_dim
        if likelihood == "gaussian":
            value, variance = pair_of(found)
            self._variances.add(variance)
        else:
            value = _probabilities(_tensor(found, likelihood), likelihood, class_dim)
        self._values.add(value)
        if likelihood in ("logits", "probabilities", "binary_logits"):
            self._entropies.add(_entropy(value, likelihood, class_dim))

    def prediction(self) -> Prediction:
        mean, classifies = self._values.mean, self._entropies.count > 0
        return Prediction(
            mean=mean,
            std=self._values.std,
            num_samples=self._values.count,
            predictive_entropy=_entropy(mean, self._likelihood, self._class_dim) if classifies else None,
            expected_entropy=self._entropies.mean if classifies else None,
            aleatoric_std=self._variances.mean.sqrt() if self._variances.count else None,
        )


class _Mean:
    """The mean of a stream of tensors, without keeping them."""

    mean: Any = 0.0  # until there is a first tensor

    def __init__(self) -> None:
        self.count = 0

    def add(self, value: Tensor) -> None:
        value = at_least_float32(value)
        self.count += 1
        self.mean = self.mean + (value - self.mean) / self.count


class _Moments(_Mean):
    """Mean and variance of a stream of tensors, without the cancellation of E[x²] - E[x]²."""

    _squares: Any = 0.0

    def add(self, value: Tensor) -> None:
        value = at_least_float32(value)
        difference = value - self.mean
        super().add(value)
        self._squares = self._squares + difference * (value - self.mean)

    @property
    def std(self) -> Tensor:
        return (self._squares / max(self.count - 1, 1)).clamp(min=0).sqrt()


def _probabilities(value: Tensor, likelihood: str, class_dim: int) -> Tensor:
    if likelihood == "logits":
        return at_least_float32(value).softmax(class_dim)
    if likelihood == "binary_logits":
        return at_least_float32(value).sigmoid()
    return value


def _entropy(probabilities: Tensor, likelihood: str, class_dim: int) -> Tensor:
    if likelihood == "binary_logits":
        return torch.special.entr(probabilities) + torch.special.entr(1 - probabilities)
    return torch.special.entr(at_least_float32(probabilities)).sum(class_dim)


def choose(found: Any, output: str | int | Callable[[Any], Any] | None) -> Any:
    if output is None:
        return found
    if callable(output):
        return output(found)
    if isinstance(output, str) and not isinstance(found, Mapping):
        return getattr(found, output)
    return found[output]


def _tensor(found: Any, likelihood: str) -> Tensor:
    if isinstance(found, Tensor):
        return found
    keys = f" with the keys {list(found)}" if isinstance(found, Mapping) else ""
    raise TypeError(
        f"predict(likelihood={likelihood!r}) needs a tensor, but the model returned {type(found).__name__}{keys}. "
        "Say which part of it with output=: a key, an attribute, an index, or a function."
    )


def pair_of(found: Any) -> tuple[Tensor, Tensor]:
    if isinstance(found, (tuple, list)) and len(found) == 2 and all(isinstance(part, Tensor) for part in found):
        return found[0], found[1]
    raise TypeError(
        f"predict(likelihood='gaussian') needs a pair of tensors (mean, variance), but the model returned "
        f"{type(found).__name__}. Make the pair with output=, for example lambda out: (out[:, 0], out[:, 1].exp())."
    )


def as_arguments(batch: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    if isinstance(batch, Mapping):
        return (), batch
    return (batch, {}) if isinstance(batch, tuple) else ((batch,), {})


def first_of(batch: Any, device: torch.device) -> Any:
    """The input among what a loader yields, on the model's device."""
    if isinstance(batch, (list, tuple)):
        batch = batch[0]
    if isinstance(batch, Mapping):
        return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    return batch.to(device) if isinstance(batch, Tensor) else batch


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for every module, and afterwards each one's own flag again, which need not be the same for all."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in training:
            if module.training != flag:
                module.train(flag)  # which may do more than set the flag: LoRA layers merge their weights in eval mode
        for module, flag in training:
            if module.training != flag:
                module.training = flag


def _concatenate(predictions: list[Prediction]) -> Prediction:
    if not predictions:
        raise ValueError("predict was given a loader without batches.")

    def joined(name: str) -> Any:
        parts = [getattr(prediction, name) for prediction in predictions]
        return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts)

    names = ("mean", "std", "predictive_entropy", "expected_entropy", "aleatoric_std")
    return Prediction(num_samples=predictions[0].num_samples, **{name: joined(name) for name in names})
