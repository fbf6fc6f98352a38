"""One prediction from the parts of it that the ranks of a process group have made."""

__all__ = ["joined"]

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, DrawError
from .averages import AVERAGES, Prediction, concatenate
from .devices import devices_of
from .likelihood import Likelihood
from .share import Share


def joined(
    share: Share,
    module: nn.Module,
    run: Callable[[], list[Prediction]],
    rows: Sequence[int | None],
    likelihood: Likelihood,
) -> Prediction:
    """The prediction of all ranks, on each of them, from those of its own batches, which ``run`` makes.

    Each average is one sum over the ranks. Where a rank has run all networks for data of its own, the others add zeros,
    and its results stay as they are.

    Raises:
        DrawError: ``run`` has failed on another rank.
        ArgumentError: The ranks were given different data without a ``DistributedSampler``, outputs do not fit
            together, or there are no batches.
    """
    mine: Prediction | None = None
    lengths: list[int] = []
    error: Exception | None = None
    try:
        predictions = run()
        lengths = [each.mean.shape[0] if each.mean.ndim else 0 for each in predictions]
        if predictions:
            mine = concatenate(predictions, rows)
            _check(share, mine)
    except Exception as raised:  # the others have to hear of it, or they would wait
        error = raised
    failure = None if error is None else f"{type(error).__name__}: {error}"
    found = share.gathered((failure, share.seen, share.part, lengths, None if mine is None else _Form(mine)))
    if error is not None:
        raise error
    for rank, (failed, *_) in enumerate(found):
        if failed is not None:
            raise DrawError(f"predict(group) has failed on rank {rank} of the group. {failed}")
    if len({seen for _, seen, *_ in found}) > 1:
        raise ArgumentError(
            "The ranks of the group were given different data. Give all of them the same, of which each rank then runs "
            "its share; or a DataLoader with a DistributedSampler, not wrapped, which tells whose examples are which."
        )
    forms = [form for *_, form in found if form is not None]
    if not forms:
        return concatenate([], rows)  # which raises: there are no batches
    places, total = _places(share, {part: lengths for *_, part, lengths, form in found if form is not None})
    if any(form.beyond_rows(total) != forms[0].beyond_rows(total) for form in forms):
        raise ArgumentError(
            f"Outputs on the ranks of the group have the shapes {[tuple(form.shape) for form in forms]}, and do not "
            "fit together. Pad inputs to one size, choose with output= what has one shape, or predict without group."
        )
    if mine is not None and isinstance(places, Tensor):
        own = {name: value[: len(places)] for name in AVERAGES if (value := getattr(mine, name)) is not None}
        mine = replace(mine, **own)  # without the examples that a sampler has repeated

    device = (devices_of(module) or [torch.device("cpu")])[0] if mine is None else mine.mean.device

    def total_of(name: str, of_mine: Callable[[Any], Tensor]) -> Any:
        if forms[0].averages[name] is None:
            return None
        shape, dtype = forms[0].averages[name]
        whole = torch.zeros(shape if total is None else (total, *shape[1:]), dtype=dtype, device=device)
        if mine is not None:
            whole[places] = of_mine(mine)
        share.add_up(whole)
        return whole

    count, class_dim = share.num_samples, forms[0].class_dim
    if not share.splits_networks:
        return Prediction(
            num_samples=count, class_dim=class_dim, **{name: total_of(name, attrgetter(name)) for name in AVERAGES}
        )
    own_count = len(share.networks)
    mean = total_of("mean", lambda mine: mine.mean * (own_count / count))

    def variance(mine: Prediction) -> Tensor:
        around_own = mine.std.square() * (own_count - 1)
        return (around_own + (mine.mean - mean[places]).abs().square() * own_count) / (count - 1)

    std = total_of("std", variance).sqrt_()
    aleatoric = total_of("aleatoric_std", lambda mine: mine.aleatoric_std.square() * (own_count / count))
    return Prediction(
        mean=mean,
        std=std,
        num_samples=count,
        predictive_entropy=likelihood.entropy(mean),
        expected_entropy=total_of("expected_entropy", lambda mine: mine.expected_entropy * (own_count / count)),
        aleatoric_std=None if aleatoric is None else aleatoric.sqrt_(),
        class_dim=class_dim,
    )


class _Form:
    """Shape and dtype of each average that a rank has; None for one that the likelihood does not tell."""

    def __init__(self, prediction: Prediction) -> None:
        self.shape, self.class_dim = prediction.mean.shape, prediction.class_dim
        self.averages: Mapping[str, Any] = {
            name: None if (value := getattr(prediction, name)) is None else (value.shape, value.dtype)
            for name in AVERAGES
        }

    def beyond_rows(self, total: int | None) -> Any:
        """What has to be the same on all ranks: all but the number of rows, if each rank has rows of its own."""
        first = 0 if total is None else 1
        return {name: form and (form[0][first:], form[1]) for name, form in self.averages.items()}


def _check(share: Share, mine: Prediction) -> None:
    """Raise an ArgumentError if it cannot be told which rows of the output belong to which example."""
    if mine.mean.is_nested:
        raise ArgumentError("predict(group) adds up dense tensors: pad the output with output=, or leave group out.")
    rows = mine.mean.shape[:1]
    averages = [value for name in AVERAGES if (value := getattr(mine, name)) is not None]
    examples = None if share.sampler is None else len(list(share.sampler))
    if share.splits_data and (() in {rows, *(value.shape for value in averages)} or examples not in (None, *rows)):
        raise ArgumentError(
            f"The averages on this rank have the shapes {[tuple(value.shape) for value in averages]}, and the first "
            f"dimension has to count the examples{f', which are {examples}' if examples else ''}, for predict(group) "
            "puts them in their places. Let the model return one result for each example, choose it with output=, and "
            "leave drop_last=True of the loader out."
        )


def _places(share: Share, lengths: Mapping[int, Sequence[int]]) -> tuple[Tensor | EllipsisType, int | None]:
    """The places of this rank's rows in the whole, and the number of rows there; None if the rank has all of them.

    ``lengths`` are those of the batches of each part.
    """
    if share.sampler is not None:
        total = len(share.sampler.dataset)  # type: ignore[arg-type]
        own = len(range(share.part, total, share.parts))  # what comes after is there to make the parts equal
        return torch.tensor(list(share.sampler)[:own], dtype=torch.long, device="cpu"), total
    if not share.splits_data:
        return ..., None
    number = sum(map(len, lengths.values()))
    batches = [lengths[batch % share.parts][batch // share.parts] for batch in range(number)]
    own = torch.arange(sum(batches), device="cpu").split(batches)[share.part :: share.parts]
    return torch.cat([torch.arange(0, device="cpu"), *own]), sum(batches)
