"""The fine-tuning of a network for CIFAR-10 that every method has."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2

import bnnify

from . import peers
from .data import Images
from .fit import fit, shuffled
from .networks.cifar_resnet import inputs

BATCH_SIZE = 128
HAS_BFLOAT16 = bool(torch.cpu.get_capabilities().get("avx512_bf16"))
AUGMENTATION = v2.Compose(
    [
        v2.RandomCrop(32, padding=4),
        v2.RandomHorizontalFlip(),
        # Blur and noise leave the network something to be uncertain about in images that it has fitted to 99.8 %.
        v2.RandomApply([v2.GaussianBlur(5, sigma=(0.1, 1.0))], p=0.1),
        v2.RandomApply([v2.GaussianNoise(sigma=0.03)], p=0.1),
    ]
)


def bfloat16() -> torch.autocast:
    """At half the time, for processors that compute in it; others take ten times as long, and stay with float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=HAS_BFLOAT16)


def augmented(pixels: Tensor) -> Tensor:
    return inputs(torch.stack([AUGMENTATION(image) for image in pixels]))


def fine_tune(
    made: peers.Bayesian,
    num_data: int,
    train: Images,
    *,
    steps: int,
    lr: float,
    decay: float,
    rho_lr: float = 0.0,
    draws: int = 1,
    description: str,
) -> nn.Module:
    """Minimises the negative ELBO by SGD with a cosine schedule; returns the network of the averaged weights.

    Args:
        made: The network; without a posterior, the cross-entropy is minimised.
        num_data: What the KL is divided by.
        train: The training images.
        steps: How many batches.
        lr: The learning rate at the start, of the weights.
        decay: That of the exponential moving average of the weights.
        rho_lr: That of ρ. Default: ``0.0``, which keeps σ as converted.
        draws: Draws of the weights per step. Default: ``1``.
        description: For the display of progress.
    """
    groups = peers.parameter_groups(made.model, lr, rho_lr)
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    average = AveragedModel(made.model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    run_steps(
        made,
        num_data,
        train,
        optimizer,
        steps,
        schedule=schedule,
        draws=draws,
        after_step=average.update_parameters,
        description=description,
    )
    return average.module


def run_steps(
    made: peers.Bayesian,
    num_data: int,
    train: Images,
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    schedule: Any = None,
    draws: int = 1,
    after_step: Callable[[nn.Module], None] = lambda model: None,
    around: Callable[[], AbstractContextManager[object]] = nullcontext,
    description: str,
) -> None:
    """Runs the optimizer on augmented batches.

    Forward and backward run in bfloat16 where the processor has it and autocast thinks it safe. Batch norm goes on
    following the batches.
    """

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        with bfloat16():
            output, kl = made.forward(images)
            nll = F.cross_entropy(output, labels)
            return nll if kl is None else bnnify.elbo(nll, kl, num_data)

    fit(
        made.model,
        optimizer,
        train,
        shuffled(len(train.labels), BATCH_SIZE, steps),
        loss,
        prepare=augmented,
        schedule=schedule,
        draws=draws,
        after_step=after_step,
        around=around,
        steps=steps,
        description=description,
    )
