"""Estimators: other places for the noise of a layer than a sample of its weights, for layers whose forward is known."""

__all__ = ["DEFAULT", "ESTIMATORS", "Estimator", "Flipout", "Local", "check_input"]

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..distributions.gaussian import at_least_float32, std
from ..errors import DrawError
from ..torch_internals import backward_pass, in_transform, is_batched
from .noise import noise_like, standard_normal_
from .processes import generator_of_process, next_seed, together
from .replay import waiting
from .sample import sample

Linear: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""The function ``(input, weight, bias) -> output`` of a layer, linear in the input and in weight and bias."""


class Estimator(ABC):
    """An alternative to the weight sample of one parameter: the draw keeps it, and the layer computes with it.

    Args:
        mean: The posterior mean.
        rho: ρ, of the same shape.
        name: The qualified name of the parameter.
    """

    def __init__(self, mean: Tensor, rho: Tensor, name: str) -> None:
        self.mean = mean
        self.rho = rho
        self._name = name
        self._was_called = False
        # Its forward may run when another model was looked at since, or in the thread of a backward pass.
        self._together = None if torch.compiler.is_compiling() else (together.groups, together.first)

    @abstractmethod
    def sample(self) -> Tensor:
        """Return the weight sample for code that reads the parameter: the same values at every read."""

    @abstractmethod
    def forward(
        self, linear: Linear, channel: int, input: Tensor, bias: Tensor | None, noisy_bias: "Estimator | None"
    ) -> Tensor:
        """Compute the output of the layer of which this is the weight.

        Args:
            linear: The function of the layer.
            channel: The dimension of the channels in its input and in its output.
            input: Its input.
            bias: The bias, or its posterior mean if it is noisy.
            noisy_bias: The estimator of the bias; None if it has none.
        """

    def note_call(self, layer: nn.Module) -> None:
        """Note a call of the layer's forward; a call that a backward pass runs again does not count.

        Raises:
            DrawError: It was called before, and would need the weights of that call, which only a sample can give.
        """
        if not torch.compiler.is_compiling():
            if self._together is not None:
                together.groups, together.first = self._together
            if backward_pass() is not None:
                return
        if self._was_called:
            raise DrawError(
                f"`{self._name}` ({type(layer).__name__}) was called twice in one forward, and only the weight sample "
                "gives both calls the same weights: convert its layer with estimator='reparameterization'."
            )
        self._was_called = True


class Local(Estimator):
    """Local reparameterization: noise on each element of the output, with the variance that the weights cause there.

    y ~ N(linear(x; μ), linear(x²; σ²)), drawn independently for each element.

    References:
        Kingma, Salimans, Welling 2015, "Variational Dropout and the Local Reparameterization Trick", section 2.3.
    """

    def __init__(self, mean: Tensor, rho: Tensor, name: str) -> None:
        super().__init__(mean, rho, name)
        # Few read the weight, so its sample is made for them alone. It is not kept: of one that was made in a region
        # under activation checkpointing, the recomputation would miss the making.
        has_no_seed = mean.is_meta or torch.compiler.is_compiling() or in_transform()
        self._sample = sample(mean, rho) if has_no_seed else None
        self._seed = 0 if has_no_seed else next_seed()

    def sample(self) -> Tensor:
        if self._sample is not None:
            return self._sample
        generator = torch.Generator(self.mean.device).manual_seed(self._seed)
        return sample(self.mean, self.rho, standard_normal_(torch.empty_like(self.mean), generator))

    def forward(
        self, linear: Linear, channel: int, input: Tensor, bias: Tensor | None, noisy_bias: Estimator | None
    ) -> Tensor:
        output = linear(input, self.mean, bias)
        kind = input.device.type
        half = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        # Squares of small numbers are zero in half precision.
        with torch.autocast(kind, enabled=False) if half else nullcontext():
            added = None if noisy_bias is None else _variance(noisy_bias.rho)
            variance = linear(at_least_float32(input).square(), _variance(self.rho), added)
        return _AddNoise.apply(output, variance, noise_like(variance))


class Flipout(Estimator):
    """Flipout: one weight sample μ + ΔW, of which each example turns the rows and columns of ΔW by random signs.

    y = linear(x; μ) + linear(x ∘ s; ΔW) ∘ r with one sign for each example (dimension 0) and channel. The bias has the
    signs r too, so that the noise of two examples is uncorrelated.

    References:
        Wen, Vicol, Ba, Tran, Grosse 2018, "Flipout: Efficient Pseudo-Independent Weight Perturbations on
        Mini-Batches", section 3.
    """

    def __init__(self, mean: Tensor, rho: Tensor, name: str) -> None:
        super().__init__(mean, rho, name)
        self.noise = sample(torch.zeros_like(mean), rho)

    def sample(self) -> Tensor:
        return self.mean + waiting(self.noise)

    def forward(
        self, linear: Linear, channel: int, input: Tensor, bias: Tensor | None, noisy_bias: Estimator | None
    ) -> Tensor:
        added = waiting(noisy_bias.noise) if isinstance(noisy_bias, Flipout) else None
        noise = linear(input * _signs(input, channel), waiting(self.noise), added)
        return torch.addcmul(linear(input, self.mean, bias), noise, _signs(noise, channel))


DEFAULT = "reparameterization"

ESTIMATORS: dict[str, type[Estimator] | None] = {DEFAULT: None, "local": Local, "flipout": Flipout}
"""The estimators by name; None for the weight sample, which needs nothing of the layer."""


def check_input(layer: nn.Module, estimator: str, input: Tensor) -> None:
    """Refuse an input with which the estimator of a layer cannot compute.

    Raises:
        DrawError: It is a nested tensor, whose examples have no common shape for noise or signs.
    """
    if input.is_nested:
        raise DrawError(
            f"A {type(layer).__name__} with estimator={estimator!r} was called with a nested tensor, for which only "
            "the weight sample works: convert the model, or this layer by name, with estimator='reparameterization', "
            "or pad the input (input.to_padded_tensor(0.0))."
        )


def _variance(rho: Tensor) -> Tensor:
    return std(rho).square()


class _AddNoise(torch.autograd.Function):
    """y + √v·ε. The gradient for v is g·ε/(2√v), and zero where v is zero and that of the root infinite.

    A v that an algorithm for convolutions has rounded to below zero counts as zero.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(output: Tensor, variance: Tensor, noise: Tensor) -> Tensor:
        root = variance.clamp(min=0.0).sqrt_()
        return torch.addcmul(output.to(root.dtype), root, noise).to(output.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        variance, noise = ctx.saved_tensors
        wide = grad.to(noise.dtype)
        if torch.is_grad_enabled():
            # Values that `where` discards must not be infinite, or their own gradients would be NaN.
            inverse = torch.where(variance > 0, variance, math.inf).rsqrt()
            return grad, 0.5 * wide * noise * inverse, None
        inverse = variance.rsqrt().nan_to_num_(nan=0.0, posinf=0.0)
        if is_batched(grad):
            return grad, 0.5 * wide * (noise * inverse), None
        return grad, inverse.mul_(noise).mul_(wide).mul_(0.5), None


def _signs(like: Tensor, channel: int) -> Tensor:
    """Draw signs that broadcast to ``like``: one for each example and channel, the same at every place in space."""
    channel %= like.ndim
    shape = [size if dim in (0, channel) else 1 for dim, size in enumerate(like.shape)]
    if torch.compiler.is_compiling():
        return torch.where(noise_like(like.new_empty(shape)) < 0, -1, 1).to(like.dtype)
    # From single bits, which costs a quarter of one random number for each sign.
    # No generator can follow a transform.
    source: dict[str, Any] = {} if in_transform() else {"generator": generator_of_process(like.device)}
    words = torch.randint(2**62, (math.prod(shape) // 62 + 1, 1), device=like.device, **source)
    bits = (words >> torch.arange(62, device=like.device)) & 1
    return (2 * bits.flatten()[: math.prod(shape)] - 1).view(shape).to(like.dtype)
