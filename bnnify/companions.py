"""What stands beside a Bayesian parameter in its module: ρ, and the mean and the scale of its prior."""

__all__ = ["COMPANIONS", "INITIAL_STD", "PRIOR_MEAN", "RHO", "PriorMean", "plain_copy"]

from typing import Any

from torch import Tensor, nn

RHO, PRIOR_MEAN, INITIAL_STD = COMPANIONS = "_rho", "_prior_mean", "_initial_std"
"""What follows a parameter's own name in the names of its ρ, of the pretrained value that a centred prior keeps, and
of the scalar buffer with the rms of the σ that its posterior started with."""


class PriorMean(nn.Parameter):
    """The mean of a prior: a parameter, which FSDP shards and DDP sends around once, but one that nothing trains.

    ``requires_grad`` is False and stays so: ``model.requires_grad_(True)``, which ends a freeze, does not reach it.
    (A DTensor stays what it is; its gradient is cut off where it is read.)
    """

    requires_grad = property(lambda self: False, lambda self, value: None)

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> "PriorMean":
        return super().__new__(cls, data, requires_grad=False)

    def requires_grad_(self, requires_grad: bool = True) -> "PriorMean":
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return PriorMean, (self.data,)


def plain_copy(scalar: Tensor) -> Tensor:
    """A scalar to compute with: not sharded, and not the buffer itself, which DDP overwrites before each forward."""
    return scalar.full_tensor() if hasattr(scalar, "full_tensor") else scalar.clone()
