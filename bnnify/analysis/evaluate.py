"""The report card of a converted model, beside the network that it was made from."""

__all__ = ["evaluate"]

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..decisions.temperature import Temperature
from ..errors import ArgumentError, check_integer, check_num_samples, checked_seed, needing
from ..model import BayesianModel, check_converted
from ..prediction.batches import count_batches
from ..prediction.known_likelihoods import LikelihoodLike, as_likelihood
from ..progress import forwards_bar
from .bootstrap import compared, separated
from .curves import curves_of
from .evaluation_report import Report
from .metrics import METRICS_OF_CLASSES, METRICS_OF_NUMBERS, columns_of, scores_of
from .outcomes import Outcomes, outcomes_of

_MEAN, _NETWORKS, _TEMPERED = "posterior mean", "networks", ", tempered"


def evaluate(
    bnn: BayesianModel,
    loader: Any,
    *,
    likelihood: LikelihoodLike,
    output: str | int | Callable[[Any], Any] | None = None,
    class_dim: int | None = None,
    num_samples: int = 32,
    seed: int = 0,
    validation: Any = None,
    out_of_distribution: Any = None,
    ignore_index: int | None = None,
    bootstrap: int = 1000,
    progress: bool = False,
) -> Report:
    """Judge the average over networks on test data, beside the network at the posterior mean and temperature scaling.

    ===================  ==========================================================================================
    classes, yes or no   accuracy, NLL, Brier score, ECE, adaptive ECE, AURC (see the page on evaluation)
    numbers              RMSE, NLL, CRPS, and coverage and width of 90 % intervals
    with foreign data    AUROC and FPR95 of what may tell them apart: entropy, mutual information, largest probability
                         and energy; of a regression ``total_std`` and the standard deviation over networks
    ===================  ==========================================================================================

    A segmentation or a sequence is judged pixel by pixel or token by token, without targets that are ignored; the
    bootstrap draws whole examples, since the pixels of one are not independent. Each loader is read once, the networks
    are those of ``bnn.predict(..., seed=seed)``, and memory holds a few numbers for each datum and class.

    Args:
        bnn: The converted model.
        loader: Test data: batches ``(input, target)``, or mappings with ``labels``, as for :func:`bnnify.tune_std`.
        likelihood: What the output means, as there; of a regression the NLL module of its training.
        output: Which part of the model's output: a key or attribute, an index, or a function. Default: all of it.
        class_dim: The dimension of the classes, as in ``predict``. Default: the last one.
        num_samples: K, the number of networks. Default: ``32``.
        seed: For networks and resamples. Default: ``0``.
        validation: Data with labels that are neither for training nor the test data. On these a temperature is fitted
            for the posterior mean and one for the average; both stand in the report. Of classes only. Default: none.
        out_of_distribution: Foreign data, with labels or without. Default: none.
        ignore_index: A target with this value does not count, among classes and yes/no answers. Default: that of a
            ``CategoricalNLL``, otherwise ``-100``.
        bootstrap: The number of resamples for the 95 % intervals; ``0`` for none, which saves time on segmentations.
            Default: ``1000``.
        progress: Show a progress bar, which needs rich, from the extra ``cli``. Default: ``False``.

    Raises:
        ArgumentError: There are no data, targets do not fit the output, the output cannot mean what the likelihood
            says or does not tell how probable a target is, or ``validation`` is given for a regression.
        ArgumentTypeError: An argument is of a wrong type, or it is not clear what of the data are inputs.
        MissingLibraryError: torchmetrics (of classes) or rich (for ``progress``) is not installed.

    Example::

        >>> report = bnnify.evaluate(bnn, test_loader, likelihood="logits", validation=validation_loader)
        >>> print(report)
        >>> report.plot("report.png")
    """
    check_converted("evaluate", bnn)
    check_num_samples(num_samples)
    seed = checked_seed("evaluate(seed)", seed)
    check_integer("evaluate(bootstrap)", bootstrap)
    if bootstrap < 0:
        raise ArgumentError(f"evaluate(bootstrap) must be a number of resamples, or 0 for none, not {bootstrap}.")
    meaning = as_likelihood(likelihood, class_dim)
    if ignore_index is not None:
        check_integer("evaluate(ignore_index)", ignore_index)
        meaning.ignore_index = ignore_index
    if validation is not None and not meaning.is_discrete:
        raise ArgumentError(
            "evaluate(validation) is for a temperature, which classes have. Of a regression fit "
            "bnnify.ConformalIntervals on these data."
        )
    if meaning.is_discrete:
        with needing("torchmetrics", "evaluate"):  # before the work, and not after it
            import torchmetrics.functional.classification  # noqa: F401

    def run(data: Any, labelled: bool = True) -> dict[str, Outcomes]:
        with forwards_bar("evaluate", num_samples, count_batches(data), progress) as advance:
            options: dict[str, Any] = {"output": output, "num_samples": num_samples, "seed": seed}
            found = outcomes_of(bnn, data, meaning, labelled=labelled, advance=advance, **options)
        return dict(zip((_MEAN, _NETWORKS), found, strict=True))

    rows = run(loader)
    temperatures: dict[str, float] = {}
    if validation is not None:
        plain, rows = rows, {}
        for row, held_out in run(validation).items():
            temperature = Temperature.fit(held_out.prediction, held_out.targets)
            rows |= {row: plain[row], row + _TEMPERED: _tempered(plain[row], temperature)}
            temperatures[row + _TEMPERED] = temperature.temperature
    foreign = {} if out_of_distribution is None else run(out_of_distribution, labelled=False)
    columns = {row: columns_of(outcomes) for row, outcomes in rows.items()}
    metrics = METRICS_OF_CLASSES if meaning.is_discrete else METRICS_OF_NUMBERS
    values, differences = compared(columns, metrics, bootstrap, seed)
    scores = {row: _both(scores_of(rows[row]), scores_of(outside)) for row, outside in foreign.items()}
    separations = {
        row: separated(found, (rows[row].examples, foreign[row].examples), bootstrap, seed)
        for row, found in scores.items()
    }
    return Report(
        rows=values,
        differences=differences,
        out_of_distribution=separations,
        temperatures=temperatures,
        num_data=len(rows[_MEAN].targets),
        num_foreign=len(foreign[_MEAN].targets) if foreign else 0,
        num_samples=num_samples,
        curves=curves_of({row: each for row, (each, _) in columns.items()}, scores, meaning.is_discrete),
    )


def _tempered(outcomes: Outcomes, temperature: Temperature) -> Outcomes:
    log_prob = temperature.log_probabilities(outcomes.prediction)
    of_target = log_prob.gather(-1, outcomes.targets.long()[:, None]).squeeze(-1)
    return replace(outcomes, prediction=temperature(outcomes.prediction), log_prob=of_target)


def _both(inside: dict[str, Tensor], outside: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (inside[name], outside[name]) for name in inside}
