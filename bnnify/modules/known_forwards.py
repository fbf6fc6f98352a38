"""The layers whose forward is known, so that an estimator can compute it."""

__all__ = ["Forward", "known_forward"]

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..torch_internals import FORWARD_METHODS, AttentionProjection, convolve, output_padding


@dataclass(frozen=True)
class Forward:
    """The forward of a layer type as a function of its weights.

    Attributes:
        layer: The layer type.
        channel: The dimension of the channels in input and output; those after it are space.
        apply: ``(layer, input, weight, bias, *args, **kwargs) -> output``, where the rest is as in the layer's forward.
    """

    layer: type[nn.Module]
    channel: int
    apply: Callable[..., Tensor]

    def is_of(self, cls: type[nn.Module]) -> bool:
        """Tell whether ``cls`` has this forward, and all that it calls."""
        return issubclass(cls, self.layer) and all(
            getattr(cls, name, None) is getattr(self.layer, name, None) for name in FORWARD_METHODS
        )


def known_forward(cls: type[nn.Module]) -> Forward | None:
    """Find the forward of a class of layers; None if it is not one that an estimator can compute."""
    if issubclass(cls, AttentionProjection):
        return None  # nn.MultiheadAttention reads the weight of its projection and never calls it
    return next((known for known in _FORWARDS if known.is_of(cls)), None)


def _transposed(
    layer: Any, input: Tensor, weight: Tensor, bias: Tensor | None, output_size: list[int] | None = None
) -> Tensor:
    extra = output_padding(layer, input, output_size)
    function: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(layer.kernel_size) - 1]
    return function(input, weight, bias, layer.stride, layer.padding, extra, layer.groups, layer.dilation)


_FORWARDS = (
    Forward(nn.Linear, -1, lambda layer, *tensors: F.linear(*tensors)),
    *(Forward(conv, -2 - n, convolve) for n, conv in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d))),
    *(
        Forward(transposed, -2 - n, _transposed)
        for n, transposed in enumerate((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    ),
)
