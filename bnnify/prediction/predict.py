"""The predictive distribution of a model, as an average over networks from its posterior."""

__all__ = ["predict"]

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..errors import ArgumentError, check_num_samples, checked_seed
from ..progress import forwards_bar
from .averages import Averages, Prediction, concatenate
from .batches import Arguments, batches_of, count_batches, rows_of
from .closed_form import averaged_in_closed_form
from .eval_mode import evaluating
from .joined import joined
from .known_likelihoods import LikelihoodLike, as_likelihood
from .loop import run_networks
from .share import Share


def predict(
    module: nn.Module,
    inputs: Any,
    num_samples: int = 32,
    *,
    likelihood: LikelihoodLike = "values",
    output: str | int | Callable[[Any], Any] | None = None,
    class_dim: int | None = None,
    antithetic: bool = False,
    networks_at_once: int = 1,
    closed_form: bool = False,
    seed: int | None = None,
    progress: bool = False,
    group: Any = None,
) -> Prediction:
    """p(y|x) = E_q[p(y|x, w)], averaged over ``num_samples`` networks, in eval mode and without gradient.

    These are the networks of ``num_samples`` rounds of ``with bnn.draw(): bnn.module(x)``, after one ``manual_seed``
    if the batches are at most 256 and take less than 256 MiB together. A loader is read once, and all its batches are
    seen by the same networks. Memory does not grow with ``num_samples``: a large output is in memory three times. If
    every layer is one of torch, torchvision, timm or transformers as published, what comes before the Bayesian weights
    is computed once for each batch, otherwise once for each network.

    ``inputs`` is one batch, with which the model is called as it stands:

    - a tensor, an array, a text or a list of texts, or any object that is not iterable or has a method ``to`` of its
      own: the only argument;
    - a tuple: the arguments; so ``([x, y],)`` is one argument that is a list;
    - a mapping, such as a ``BatchEncoding``: the keyword arguments;

    or anything that gives batches: a ``DataLoader`` or another loader, a generator, a list. Then results are
    concatenated along the first dimension, and each batch is moved to the device of the model's first parameter, with
    all that is nested in it, unless a tensor of it is on another accelerator of the model already. A batch may be

    - a list or tuple ``(inputs,)`` or ``(inputs, target)``, with inputs as above; the target is left out;
    - a mapping of keyword arguments; its ``labels`` are left out (to pass them on, give ``(mapping,)``);
    - anything else: the only argument.

    A batch ``(x, t, y)`` does not tell which are inputs: give ``(((x, t), y) for x, t, y in loader)``. A list of
    tensors that differ in dtype or shape, as one batch ``[x, y]`` of a loader is, is refused: give ``x``.

    ``likelihood`` says what the model's output means:

    ===================  ==========================================================================================
    ``"values"``         real or complex numbers, averaged as they are; of yes and no (bool) the share of yes
    ``"logits"``         unnormalised log probabilities of classes along ``class_dim``
    ``"probabilities"``  probabilities of classes along ``class_dim``
    ``"binary_logits"``  independent logits of yes/no questions
    ``"gaussian"``       a pair (mean, variance) of a regression that predicts its own noise
    an NLL module        what bnnify's NLL module that the network was trained with says, such as
                         ``GaussianNLL(learned=True)``, whose noise is then part of ``total_std``
    a function           what makes a ``torch.distributions`` object of it, such as ``lambda mean: Normal(mean, 0.1)``
    ===================  ==========================================================================================

    Args:
        module: A module that contains converted ones, such as ``bnn.module``.
        inputs: One batch, or what gives batches: see above.
        num_samples: K, the number of networks. Default: ``32``.
        likelihood: See above. Default: ``"values"``, which assumes nothing and tells no entropies.
        output: Which part of the model's output: a key or attribute, an index, or a function. Default: all of it.
        class_dim: The dimension of the classes, for ``"logits"`` and ``"probabilities"``. Segmentation models usually
            have it at ``1``. Default: the last one; of an output with more than three dimensions it must be said.
        antithetic: Draw the networks in pairs with the noise ε and -ε. The mean stays unbiased, and where the output is
            nearly linear in the weights it is far more precise, so that ``std / √K`` is no longer its error. ``std``
            and the mutual information gain nothing: if the outputs of a pair have the correlation c, the variance
            that ``std`` is the root of is on average ``(K - 1 - c) / (K - 1)`` times the true one. For c < 0 that is
            too wide, by at most the factor ``K / (K - 1)``, and never too narrow. Of an odd K the last network has no
            partner. Default: ``False``.
        networks_at_once: How many networks run in one forward, by ``torch.func.vmap``; the last forward may have fewer.
            Layers without a posterior then multiply the inputs of all networks at a time, which is faster where small
            inputs meet large layers, as under Bayesian adapters of a language model; memory for activations grows with
            it. The networks are the same, and outputs differ by rounding. Of HF models choose a tensor, with
            ``output="logits"``. Default: ``1``.
        closed_form: Run the model once for each batch, and average over the exact distribution of its output. That is
            possible where one linear layer has all the noise and returns the output, as after ``convert(model,
            select="fc")``; elsewhere it is refused. ``"values"`` have the exact mean and ``std``. Of ``"logits"`` and
            ``"binary_logits"`` ``num_samples`` are drawn, for each example, and each place in a sequence, by itself:
            what is told of each is right, but two that one network would get wrong together do not go together here.
            Random numbers that the forward draws for itself are drawn once. Default: ``False``.
        seed: Draw the networks from random number generators of their own, which start from it: calls with one seed see
            the same networks, in any thread and process, and the first of 32 are those of ``num_samples=8``. So batches
            may be predicted one at a time, and of a prediction may be kept what is needed:
            ``[bnn.predict([batch], seed=0, likelihood="logits").mutual_information for batch in loader]``. Random
            numbers that the forward draws for itself are still the program's. Default: ``None``, new networks.
        progress: Show a progress bar, which needs rich, from the extra ``cli``. Default: ``False``.
        group: A process group of ``torch.distributed``, such as ``torch.distributed.group.WORLD``, whose ranks all call
            this and share the work; each gets the whole prediction. See below. Default: ``None``, this process alone.

    With ``group`` the ranks are given **the same inputs** and split the networks; if there are fewer networks than
    ranks, and a loader, also the batches, of which each rank reads all. Or each is given a ``DataLoader`` with a
    ``DistributedSampler``: then it predicts what its sampler gives it, with all networks, or with a part of them if
    the sampler has fewer replicas than the group has ranks; examples that the sampler repeats are left out, and the
    result is in the order of the data set, shuffled or not. (The loader itself has to be given, not a generator around
    it.) The networks are those that one process has for the same ``seed``. If the data alone are split, and the batches
    are the same, so is the result; if the networks are, the averages differ by rounding. ``closed_form`` splits the
    data alone, and so does a model that FSDP2 has sharded, whose ranks run each network together; it needs the sampler.

    Raises:
        ArgumentError: ``num_samples`` is not positive, ``seed`` is negative or above 2⁶³ - 1, ``likelihood`` is
            unknown, or the loader has no batches; or the output is not what ``likelihood`` says: probabilities that are
            negative or do not sum to one, one logit where there should be one for each class, a negative variance, NaN.
            Or outputs cannot be put together: their shape differs between networks, or between batches otherwise than
            in the first dimension. Or with ``networks_at_once``, ``closed_form`` or ``group`` the model cannot run so:
            the message says why.
        ArgumentTypeError: The chosen output is not a tensor (or, for ``"gaussian"``, a pair of tensors), or holds
            integers; or it is not clear whether ``inputs`` is one batch, or what of it are inputs.
        DrawError: The prediction has failed on another rank of the ``group``.
        MissingLibraryError: ``progress`` was asked for, and rich is not installed.

    References:
        Depeweg et al. 2018, "Decomposition of Uncertainty in Bayesian Deep Learning", eq. 3 (the entropies) and eq. 5.
    """
    check_num_samples(num_samples)
    check_num_samples(networks_at_once, "networks_at_once")
    meaning = as_likelihood(likelihood, class_dim)
    if seed is not None:
        seed = checked_seed("seed", seed)
    if closed_form and (antithetic or networks_at_once != 1):
        raise ArgumentError("closed_form=True draws no networks. Leave out antithetic and networks_at_once.")
    share = None
    if group is not None:
        share = Share(group, module, inputs, num_samples, seed, antithetic=antithetic, closed_form=closed_form)
    networks, seed = (range(num_samples), seed) if share is None else (share.networks, share.seed)
    rows: list[int | None] = []

    def batches() -> Iterator[Arguments]:
        given = batches_of(inputs, module)
        for arguments in given if share is None else share.own(given):
            rows.append(rows_of(arguments))
            yield arguments

    def run() -> list[Prediction]:
        if closed_form:
            predictions = []
            for arguments in batches():
                predictions.append(averaged_in_closed_form(module, arguments, num_samples, meaning, output, seed))
                advance()
            return predictions
        averages: list[Averages] = []
        options: dict[str, Any] = {"output": output, "antithetic": antithetic, "at_once": networks_at_once}
        for index, found in run_networks(module, batches(), networks, seed=seed, **options):
            if index == len(averages):
                averages.append(Averages(meaning, rows[index]))
            averages[index].add(found)
            del found
            advance()
        return [averages.pop(0).prediction() for _ in range(len(averages))]

    forwards, count = 1 if closed_form else len(networks), count_batches(inputs) if share is None else None
    with evaluating(module), torch.no_grad(), forwards_bar("predict", forwards, count, progress) as advance:
        return concatenate(run(), rows) if share is None else joined(share, module, run, rows, meaning)
