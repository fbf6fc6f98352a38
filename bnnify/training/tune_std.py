"""Choose one factor on σ by held-out data, with labels or without: the Bayesian counterpart of temperature scaling."""

__all__ = ["tune_std"]

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..draws.sharding import is_sharding
from ..errors import ArgumentError, check_integer, check_num_samples, check_positive, checked_seed
from ..model import BayesianModel, check_converted
from ..prediction.batches import batches_of, labelled_batches_of, rows_of
from ..prediction.eval_mode import evaluating
from ..prediction.known_likelihoods import LikelihoodLike, as_likelihood
from ..prediction.likelihood import Likelihood
from .factor_search import largest_passing, minimum, walk
from .held_out import HeldOut, Labelled, Unlabelled
from .scaled_std import ScaledStd, layers_of, log_ratio
from .tuned_std import TunedStd
from .tuning_progress import TuningProgress


def tune_std(
    bnn: BayesianModel,
    data: Any,
    *,
    likelihood: LikelihoodLike = "values",
    labels: bool = True,
    tolerance: float = 0.005,
    num_samples: int = 8,
    output: str | int | Callable[[Any], Any] | None = None,
    class_dim: int | None = None,
    ignore_index: int | None = None,
    per_layer: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> TunedStd:
    """Multiply every σ by the one factor that held-out data ask for; nothing is trained.

    With labels, minimise over the factor::

        -log mean_k p(y|x, w_k), averaged over the data.

    Without, take the largest factor for which, with p₀ the prediction of the network at the posterior mean::

        KL(p₀(y|x) ‖ mean_k p(y|x, w_k)), averaged over the data, is at most ``tolerance``.

    If the mean network is calibrated, labels are distributed as p₀, and that KL is exactly what noise is expected to
    add to the NLL. So a calibrated network loses at most ``tolerance`` nats per datum, and one that is overconfident
    gains from the noise. The factor returned has passed, and the next larger one that was tried has not; if even the
    smallest does not pass, it is returned. None is chosen that makes rms(σ) larger than that of the weights, which an
    untrained network may bear.

    Every factor is judged with the same ``num_samples`` networks: the same ε, scaled. The search begins at fixed sizes
    of σ relative to the weights, so how large σ was before has no say. It passes 13 to 15 times over the data with
    labels and 6 to 11 times without, as often as ``predict`` with that many networks would, in eval mode. The data are
    kept in memory and, without labels, two numbers for each datum and class. Under tensor
    parallelism every rank has to call this with the same data.

    The prior moves along: a ``Pretrained`` prior without a std of its own becomes as wide as σ, whatever its
    ``scale``, so that training goes on from σ as tuned, and not back; one that is wide because the network looked
    untrained stays so, also after saving and loading. Weights loaded later by :func:`bnnify.load_weights` start with
    the σ of the rule anew, and the prior's scale with it, unless they bring both. The result is written into
    ``bnn.report``.

    Args:
        bnn: The converted model, whose ρ change in place. Pruned weights stay pruned. If tuning fails, nothing changes.
        data: What the network was not trained on; some hundred examples do for one factor, and they should look like
            what the network will see. With labels an iterable of batches ``(input, target)``, or of mappings with
            ``labels``; without, whatever :func:`bnnify.prediction.predict` takes, by the same rule, which leaves
            targets out.
        likelihood: What the output means, as in :func:`bnnify.prediction.predict`: ``"logits"``, ``"probabilities"``,
            ``"binary_logits"``, ``"gaussian"``, the NLL module of the training, or a function that makes a
            ``torch.distributions`` object of it, such as ``lambda mean: Normal(mean, 0.1)``. Each element of its
            ``log_prob(target)`` counts as one datum; the target must have the shape of what it draws. The default,
            ``"values"``, is refused: it is no probability.
        labels: Use the targets. Default: ``True``.
        tolerance: The KL allowed without labels, in nats per datum. Default: ``0.005``.
        num_samples: K, the number of networks. Default: ``8``.
        output: Which part of the model's output: a key or attribute, an index, or a function. Default: all of it.
            The labels of a causal language model are those of the next token: ``lambda out: out.logits[:, :-1]``, with
            pairs ``(inputs, labels[:, 1:])``.
        class_dim: The dimension of the classes, as in ``predict``. Default: the last one.
        ignore_index: A target with this value does not count, among classes and yes/no answers. Default: that of a
            ``CategoricalNLL``, otherwise ``-100``.
        per_layer: Afterwards give each layer in turn a factor of its own, a power of two times the common one, where
            that helps. It takes labels, at least two more passes for each layer, and more data. Default: ``False``.
        seed: For the random numbers; those of the program are left alone. Default: ``0``.
        progress: Show a progress bar and every factor that was tried with its loss, which needs rich, from the extra
            ``cli``. Default: ``False``.

    Raises:
        ArgumentError: No σ is there to be tuned, the data are empty or have no targets, a target does not fit the
            output (such as a shape of (N,) for an output of shape (N, 1)), the output cannot mean what the likelihood
            says, no factor gives a finite likelihood, ``num_samples`` or ``tolerance`` is not positive,
            ``per_layer`` goes without labels, or FSDP shards the model.
        ArgumentTypeError: An argument is of a wrong type; ``data`` is one batch, with labels; or it is not clear what
            the inputs are.
        MissingLibraryError: ``progress`` was asked for, and rich is not installed.

    Example::

        >>> bnn = bnnify.convert(nn.Linear(3, 2))
        >>> tuned = bnnify.tune_std(bnn, torch.randn(8, 3), likelihood="logits", labels=False)
        >>> tuned.after <= 0.005
        True
    """
    check_converted("tune_std", bnn)
    check_num_samples(num_samples)
    seed = checked_seed("tune_std(seed)", seed)
    check_positive("tune_std(tolerance)", tolerance, ArgumentError)
    meaning = as_likelihood(likelihood, class_dim)
    ignore_index = meaning.ignore_index if ignore_index is None else ignore_index
    check_integer("tune_std(ignore_index)", ignore_index)
    if per_layer and not labels:
        raise ArgumentError("per_layer=True needs labels; without, less noise is always nearer to the mean network.")
    if any(map(is_sharding, bnn.modules())):
        raise ArgumentError("tune_std cannot tune a model that FSDP has sharded: call it before fully_shard.")
    layers = layers_of(bnn.module)
    if not layers:
        raise ArgumentError("tune_std found nothing to tune: no parameter of the model has a σ.")
    everything = [scaled for layer in layers.values() for scaled in layer]
    generators = torch.random.fork_rng(range(torch.cuda.device_count()))
    with evaluating(bnn), torch.no_grad(), generators, TuningProgress(progress) as bar:
        torch.manual_seed(seed)  # targets may be drawn
        read = _labelled if labels else _unlabelled
        held_out = read(data, bnn.module, meaning, output, ignore_index)

        def loss(which: list[ScaledStd], log_factor: float, what: str = "σ") -> float:
            for scaled in which:
                scaled.multiply(log_factor)
            bar.begin(what, log_factor, num_samples * len(held_out.batches))
            torch.manual_seed(seed)
            found = held_out.loss(num_samples, bar.advance)
            bar.end(what, log_factor, found)
            return found

        tried: dict[float, float] = {}

        def common_loss(log_factor: float) -> float:
            if log_factor not in tried:
                tried[log_factor] = loss(everything, log_factor)
            return tried[log_factor]

        try:
            size = log_ratio(everything)
            before = common_loss(0.0)
            if labels:
                common = minimum(common_loss, size)
            else:
                common = largest_passing(lambda x: common_loss(x) <= tolerance, size)
            after, factors = common_loss(common), {}
            for scaled in everything:
                scaled.multiply(common)
            for name, layer in layers.items() if per_layer else ():
                own, after = walk(lambda x, layer=layer, name=name: loss(layer, x, name), common, after)  # type: ignore[misc]
                for scaled in layer:
                    scaled.multiply(own)
                factors[name] = math.exp(own)
            tuned = TunedStd(
                factor=math.exp(common),
                before=before,
                after=after,
                deterministic=held_out.deterministic,
                ratio=math.exp(log_ratio(everything)),
                num_data=held_out.num_data,
                factors=factors,
                tried=tuple((math.exp(x), found) for x, found in tried.items()),
                tolerance=None if labels else tolerance,
            )
        except BaseException:
            for scaled in everything:
                scaled.restore()
            raise
    bnn.report = replace(bnn.report, tuning=str(tuned))
    return tuned


def _labelled(data: Any, module: nn.Module, meaning: Likelihood, output: Any, ignore_index: int) -> HeldOut:
    # A list, because a loader that shuffles would give other batches to each factor.
    batches = list(labelled_batches_of(data, module, "tune_std"))
    _check_any(batches)
    counting = [batch for batch in batches if not (isinstance(batch[1], Tensor) and batch[1].numel() == 0)]
    return Labelled(module, counting, meaning, output, ignore_index)


def _unlabelled(data: Any, module: nn.Module, meaning: Likelihood, output: Any, ignore_index: int) -> HeldOut:
    batches = list(batches_of(data, module))
    _check_any(batches)
    return Unlabelled(module, [batch for batch in batches if rows_of(batch) != 0], meaning, output)


def _check_any(batches: list[Any]) -> None:
    if not batches:
        raise ArgumentError("tune_std was given a loader without batches.")
