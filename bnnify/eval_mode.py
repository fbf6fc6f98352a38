"""Eval mode for as long as a block runs."""

__all__ = ["evaluating"]

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


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
