"""Training: one loop for every benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LRScheduler

from .progress import track

Loss = Callable[[Any, Tensor, Tensor], Tensor]
"""From a model, inputs and labels to the loss."""


def cross_entropy(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs), labels)


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: tuple[Tensor, Tensor],
    indices: Iterable[Tensor],
    loss: Loss = cross_entropy,
    *,
    prepare: Callable[[Tensor], Tensor] = lambda inputs: inputs,
    schedule: LRScheduler | None = None,
    draws: int = 1,
    after_step: Callable[[nn.Module], None] = lambda model: None,
    around: Callable[[], AbstractContextManager[object]] = nullcontext,
    steps: int | None = None,
    description: str = "training",
) -> None:
    """Trains a model, in train mode, for one step on each batch.

    Args:
        model: The model.
        optimizer: The optimizer of its parameters.
        data: Inputs and labels.
        indices: Those of each batch, as :func:`shuffled` gives them.
        loss: What is minimised. Default: the cross-entropy of its output.
        prepare: Makes the inputs of the model from those of a batch, such as by augmentation. Default: nothing.
        schedule: The learning rate, step by step; its ``last_epoch`` counts the steps. Default: constant.
        draws: How many times the loss is computed in each step; the gradient is their mean's. Default: ``1``.
        after_step: Called with the model after each step.
        around: Makes the context in which each loss and its gradient are computed. Default: none.
        steps: How many batches there are, for the display of progress.
        description: For the display of progress.
    """
    model.train()
    inputs, labels = data
    for index in track(indices, description, total=steps):
        batch = prepare(inputs[index])
        optimizer.zero_grad()
        for _ in range(draws):
            with around():
                (loss(model, batch, labels[index]) / draws).backward()
        optimizer.step()
        if schedule:
            schedule.step()
        after_step(model)


def shuffled(size: int, batch_size: int, steps: int, drop_last: bool = True) -> Iterator[Tensor]:
    """Indices of batches without replacement, from as many epochs as ``steps`` batches take.

    Args:
        size: How many data there are.
        batch_size: How many of them are in a batch.
        steps: How many batches.
        drop_last: Whether the data that are left at the end of an epoch, fewer than a batch, are left out. Default:
            ``True``.
    """
    per_epoch = size // batch_size if drop_last else -(-size // batch_size)
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(size).split(batch_size)
        yield order[step % per_epoch]
