"""Choose one factor on σ by held-out likelihood, the Bayesian counterpart of temperature scaling."""

__all__ = ["tune_std"]

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from ..distributions.gaussian import at_least_float32, is_pruned, rho_from_std, std
from ..errors import ArgumentError, check_integer, check_num_samples
from ..model import BayesianModel, check_converted
from ..modules.parameters import BayesianParameter, unique_bayesian_parameters
from ..prediction.batches import Arguments, labelled_batches_of, rows_of
from ..prediction.eval_mode import evaluating
from ..prediction.known_likelihoods import LikelihoodLike, as_likelihood
from ..prediction.loop import run_networks
from .targets import IGNORED, log_prob_of

_LOG_LEVELS = [power * math.log(2) for power in range(-6, 1)]
"""log(rms(σ)/rms(μ)) of the first candidates."""

_MOST_LEVELS = 12
"""The greatest number of candidates if the largest is the best."""

_PRECISION = 0.1
"""The error of log σ that ends the search."""

_NOTICEABLE = 1e-4
"""The least gain of likelihood, in nats per datum, for which a layer gets a factor of its own."""


@overload
def tune_std(
    bnn: BayesianModel,
    loader: Iterable[Any],
    *,
    num_samples: int = ...,
    likelihood: LikelihoodLike = ...,
    output: str | int | Callable[[Any], Any] | None = ...,
    class_dim: int | None = ...,
    ignore_index: int = ...,
    per_layer: Literal[False] = ...,
    seed: int = ...,
) -> float: ...
@overload
def tune_std(
    bnn: BayesianModel,
    loader: Iterable[Any],
    *,
    num_samples: int = ...,
    likelihood: LikelihoodLike = ...,
    output: str | int | Callable[[Any], Any] | None = ...,
    class_dim: int | None = ...,
    ignore_index: int = ...,
    per_layer: Literal[True],
    seed: int = ...,
) -> dict[str, float]: ...
def tune_std(
    bnn: BayesianModel,
    loader: Iterable[Any],
    *,
    num_samples: int = 8,
    likelihood: LikelihoodLike = "values",
    output: str | int | Callable[[Any], Any] | None = None,
    class_dim: int | None = None,
    ignore_index: int = IGNORED,
    per_layer: bool = False,
    seed: int = 0,
) -> float | dict[str, float]:
    """Multiply every σ by the one factor that makes held-out data most likely; nothing is trained.

    minimise over the factor: -log mean_k p(y|x, w_k), averaged over the data

    How large σ should be depends on the network: one that is overconfident gains from noise that would only harm one
    that is calibrated. Every factor is judged with the same random numbers. The search begins at fixed sizes of σ
    relative to the weights, so how large σ was before has no say. It takes about 13 passes over the data, in eval mode,
    in which each batch meets ``num_samples`` networks of its own. The data are kept in memory. The prior stays as it
    was. If a model is sharded, every rank has to call this with the same data.

    Args:
        bnn: The converted model, whose ρ change in place. Pruned weights stay pruned. If tuning fails, nothing changes.
        loader: Held-out data, which the network was not trained on: any iterable of batches ``(input, target)``, or of
            mappings with ``labels``, by the rule of :func:`bnnify.prediction.predict`. Some hundred examples do for one
            factor; they should look like what the network will see.
        num_samples: K, the number of networks. Default: ``8``.
        likelihood: What the output means, as in :func:`bnnify.prediction.predict`: ``"logits"``, ``"probabilities"``,
            ``"binary_logits"``, ``"gaussian"``, or a function that makes a ``torch.distributions`` object of it, such
            as ``lambda mean: Normal(mean, 0.1)``. Each element of its ``log_prob(target)`` counts as one datum; the
            target must have the shape of what it draws. The default, ``"values"``, is refused: it is no probability.
        output: Which part of the model's output: a key or attribute, an index, or a function. Default: all of it.
            The labels of a causal language model are those of the next token: ``lambda out: out.logits[:, :-1]``, with
            pairs ``(inputs, labels[:, 1:])``.
        class_dim: The dimension of the classes, as in ``predict``. Default: the last one.
        ignore_index: A target with this value does not count, among classes and yes/no answers. Default: ``-100``.
        per_layer: Afterwards give each layer in turn a factor of its own, a power of two times the common one, where
            that helps. It takes at least two more passes for each layer, and more data. Default: ``False``.
        seed: For the random numbers; those of the program are left alone. Default: ``0``.

    Returns:
        The factor; with ``per_layer``, that of each layer, by its qualified name.

    Raises:
        ArgumentError: No σ is there to be tuned, the loader is empty or gives no targets, a target does not fit the
            output (such as a shape of (N,) for an output of shape (N, 1)), the output cannot mean what the likelihood
            says, no factor gives a finite likelihood, or ``num_samples`` is not positive.
        ArgumentTypeError: An argument is of a wrong type; ``loader`` is one batch; or it is not clear what its inputs
            are.

    Example::

        >>> bnn = bnnify.convert(nn.Linear(3, 2))
        >>> factor = bnnify.tune_std(bnn, [(torch.randn(8, 3), torch.randint(2, (8,)))], likelihood="logits")
    """
    check_converted("tune_std", bnn)
    check_num_samples(num_samples)
    check_integer("tune_std(ignore_index)", ignore_index)
    check_integer("tune_std(seed)", seed)
    meaning = as_likelihood(likelihood, class_dim)
    layers = _layers(bnn)
    if not layers:
        raise ArgumentError("tune_std found nothing to tune: no parameter of the model has a σ.")
    everything = [scaled for layer in layers.values() for scaled in layer]
    with evaluating(bnn), torch.no_grad(), torch.random.fork_rng(range(torch.cuda.device_count())):
        # A list, because a loader that shuffles would give other batches to each factor.
        batches = _read(loader, bnn.module)

        def nll(which: list[_Scaled], log_factor: float) -> float:
            """-log mean_k p(y|x, w_k), averaged over the data; infinite where it is not a number."""
            for scaled in which:
                scaled.multiply(log_factor)
            torch.manual_seed(seed)
            terms = []
            for arguments, target in batches:  # each with networks of its own: the more there are, the less noise
                rows = rows_of(arguments)
                outputs = run_networks(bnn.module, [arguments], num_samples, output=output)
                draws = [log_prob_of(target, meaning.distribution(found, rows), ignore_index) for _, found in outputs]
                terms.append(math.log(num_samples) - torch.stack(draws).logsumexp(0))
            if not sum(map(len, terms)):
                raise ArgumentError("tune_std: no target counts; all are ignored or empty.")
            mean = torch.cat(terms).mean().item()
            return math.inf if math.isnan(mean) else mean

        try:
            size = _log_size(everything)
            common, best = _minimum(lambda x: nll(everything, x), [level - size for level in _LOG_LEVELS])
            for scaled in everything:
                scaled.multiply(common)
            if not per_layer:
                return math.exp(common)
            factors = {}
            for name, layer in layers.items():
                own, best = _nearby(lambda x, layer=layer: nll(layer, x), common, best)  # type: ignore[misc]
                for scaled in layer:
                    scaled.multiply(own)
                factors[name] = math.exp(own)
            return factors
        except BaseException:
            for scaled in everything:
                scaled.restore()
            raise


class _Scaled:
    """A Bayesian parameter whose σ is multiplied, always starting from its first value."""

    def __init__(self, parameter: BayesianParameter) -> None:
        self.parameter = parameter
        self.before = parameter.rho.detach().clone()

    def multiply(self, log_factor: float) -> None:
        """Set σ to e^``log_factor`` times its first value; pruned weights stay pruned."""
        sigma = std(at_least_float32(self.before)) * math.exp(log_factor)
        rho = rho_from_std(sigma).to(self.before.dtype)
        self.parameter.rho.copy_(torch.where(is_pruned(self.before), self.before, rho))

    def restore(self) -> None:
        self.parameter.rho.copy_(self.before)


def _layers(bnn: BayesianModel) -> dict[str, list[_Scaled]]:
    """Group the parameters that have a σ, each once, by the qualified name of their module."""
    layers: dict[str, list[_Scaled]] = {}
    for parameter in unique_bayesian_parameters(bnn.module):
        if parameter.has_rho:
            layers.setdefault(parameter.name.rpartition(".")[0], []).append(_Scaled(parameter))
    return layers


def _log_size(everything: list[_Scaled]) -> float:
    """log(rms(σ) / rms(μ)), over all weights."""
    variance = sum(std(at_least_float32(s.before)).double().square().sum().item() for s in everything)
    square = sum(s.parameter.mean.double().square().sum().item() for s in everything)
    return 0.5 * math.log(variance / square) if variance > 0 and square > 0 else 0.0


def _read(loader: Iterable[Any], module: nn.Module) -> list[tuple[Arguments, Any]]:
    """Read arguments and target of each batch, but for empty ones."""
    batches = list(labelled_batches_of(loader, module, "tune_std"))
    if not batches:
        raise ArgumentError("tune_std was given a loader without batches.")
    return [batch for batch in batches if not (isinstance(batch[1], Tensor) and batch[1].numel() == 0)]


def _minimum(function: Callable[[float], float], grid: list[float]) -> tuple[float, float]:
    """Minimise a function of one variable, on a grid and then by golden section: the place and the value there.

    Raises:
        ArgumentError: It is finite nowhere on the grid.
    """
    grid = list(grid)
    values = {x: function(x) for x in grid}
    while min(grid, key=values.__getitem__) == grid[-1] and len(grid) < _MOST_LEVELS:  # it may be beyond
        grid.append(2 * grid[-1] - grid[-2])
        values[grid[-1]] = function(grid[-1])
    centre = grid.index(min(grid, key=values.__getitem__))
    if not math.isfinite(values[grid[centre]]):
        raise ArgumentError("tune_std: under no factor on σ is the likelihood of the held-out data finite.")
    low, high = grid[max(centre - 1, 0)], grid[min(centre + 1, len(grid) - 1)]
    golden = (math.sqrt(5) - 1) / 2
    left, right = high - golden * (high - low), low + golden * (high - low)
    values |= {left: function(left), right: function(right)}
    while high - low > 2 * _PRECISION:
        if values[left] <= values[right]:
            high, right, left = right, left, right - golden * (right - low)
            values[left] = function(left)
        else:
            low, left, right = left, right, left + golden * (high - left)
            values[right] = function(right)
    return min(values.items(), key=lambda item: item[1])


def _nearby(function: Callable[[float], float], start: float, value: float) -> tuple[float, float]:
    """Walk from ``start``, where the function has this ``value``, in steps of log 2 for as long as that helps."""
    for step in math.log(2), -math.log(2):
        x = start
        while (there := function(x + step)) < value - _NOTICEABLE:
            x, value = x + step, there
        if x != start:
            return x, value
    return start, value
