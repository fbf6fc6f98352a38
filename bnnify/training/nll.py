"""Negative log likelihoods to train with: means over the data, in nats, with all constants, of one or several draws.

Each is called as ``nll(output, target)``, for ``bnnify.elbo(nll(output, target), kl, num_data=N)``. The output is that
of one network, or what ``bnn.sample`` gives: then it has one dimension more, in front, and the mean runs over the draws
too. That is the mean of the draws' NLLs, for which the ELBO asks. The NLL of their averaged output is another number,
and as a rule a smaller one.

Each tells, too, what an output means: ``predict(..., likelihood=nll)``, and so wherever a likelihood is taken.
"""

__all__ = ["BernoulliNLL", "CategoricalNLL", "GaussianNLL", "HeteroscedasticGaussianNLL"]

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal

from ..distributions.gaussian import at_least_float32
from ..errors import ArgumentError, as_number, check_integer, check_tensor
from ..prediction.known_likelihoods import BinaryLogits, GaussianPair, Logits, OfFunction, as_pair
from ..prediction.likelihood import Likelihood


class CategoricalNLL(nn.Module):
    """The NLL of classes, from unnormalised log probabilities: ``F.cross_entropy``, for any number of draws.

    The output has the shape of the target and a dimension of classes, and after ``bnn.sample`` one of draws in front.
    The target holds class numbers.

    Args:
        class_dim: The dimension of the classes in the output of one network, as in :meth:`BayesianModel.predict`.
            Default: ``-1``; segmentation models usually have it at ``1``.
        ignore_index: A target with this value does not count. Default: ``-100``.

    Raises:
        ArgumentError: The shapes do not fit, or the target does not hold integers.
        ArgumentTypeError: Output or target is no tensor, or an argument no integer.

    Example::

        >>> nll = CategoricalNLL()
        >>> logits, y = torch.randn(4, 8, 10), torch.randint(10, (8,))  # 4 draws, 8 images, 10 classes
        >>> torch.allclose(nll(logits, y), torch.stack([nll(draw, y) for draw in logits]).mean())
        True
    """

    def __init__(self, class_dim: int = -1, ignore_index: int = -100) -> None:
        super().__init__()
        check_integer("CategoricalNLL(class_dim)", class_dim)
        check_integer("CategoricalNLL(ignore_index)", ignore_index)
        self.class_dim = class_dim
        self.ignore_index = ignore_index

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        _check_tensors("CategoricalNLL", output, target)
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            raise ArgumentError(f"CategoricalNLL takes the numbers of classes as target, integers, not {target.dtype}.")
        draws = output.ndim - target.ndim - 1
        dims = target.ndim + 1
        if draws not in (0, min(1, target.ndim)) or not -dims <= self.class_dim < dims:
            _refuse("CategoricalNLL", output, target, f"and classes along dimension {self.class_dim}")
        logits = at_least_float32(output).movedim(self.class_dim % dims + draws, -1)
        if logits.shape[draws:-1] != target.shape:
            _refuse("CategoricalNLL", output, target, f"and classes along dimension {self.class_dim}")
        labels = target.expand(logits.shape[:-1])
        return F.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), labels.reshape(-1).long(), ignore_index=self.ignore_index
        )

    def likelihood(self, class_dim: int | None = None) -> Likelihood:
        """What the output means, with the classes along ``class_dim``, by default as here."""
        likelihood = Logits(self.class_dim if class_dim is None else class_dim)
        likelihood.ignore_index = self.ignore_index
        return likelihood

    def extra_repr(self) -> str:
        return f"class_dim={self.class_dim}, ignore_index={self.ignore_index}"


class BernoulliNLL(nn.Module):
    """The NLL of independent yes/no answers, from one logit for each of them.

    The output has the shape of the target, and after ``bnn.sample`` a dimension of draws in front. The target holds
    probabilities, as a rule 0 and 1.

    Raises:
        ArgumentError: The shapes do not fit.
        ArgumentTypeError: Output or target is no tensor.

    Example::

        >>> BernoulliNLL()(torch.zeros(5), torch.ones(5))
        tensor(0.6931)
    """

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        _check("BernoulliNLL", output, target)
        logits = at_least_float32(output)
        return F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype).expand_as(logits))

    def likelihood(self, class_dim: int | None = None) -> Likelihood:
        """What the output means."""
        return BinaryLogits(class_dim)


class GaussianNLL(nn.Module):
    """The NLL of a regression whose noise has one standard deviation, known or learned.

    -log N(y; f, s²) = (y - f)² / 2s² + log s + ½ log 2π

    The output holds f. It has the shape of the target, and after ``bnn.sample`` a dimension of draws in front.

    Args:
        std: s in the units of the target: a number, or a tensor that broadcasts to the target, such as one s for each
            output. With ``learned``, where it starts.
        learned: Make ``log_std`` a parameter, to be given to the optimizer, without weight decay. It follows the
            residuals: maximum likelihood for the noise, whatever the posterior of the weights. Default: ``False``.

    Raises:
        ArgumentError: ``std`` is not positive, or the shapes do not fit.
        ArgumentTypeError: ``std`` is neither a number nor a tensor, or output or target is no tensor.

    Example::

        >>> nll = GaussianNLL(std=0.1, learned=True)
        >>> groups = [*bnn.parameter_groups(lr=1e-3), {"params": nll.parameters(), "lr": 1e-2, "weight_decay": 0.0}]
        >>> round(nll(torch.zeros(5), torch.zeros(5)).item(), 4)  # log 0.1 + ½ log 2π
        -1.3836
    """

    log_std: Tensor

    def __init__(self, std: float | Tensor, learned: bool = False) -> None:
        super().__init__()
        if not isinstance(std, Tensor):
            as_number("GaussianNLL(std)", std, "It may be a tensor too, such as one std for each output.")
        log_std = torch.as_tensor(std, dtype=None if isinstance(std, Tensor) else torch.get_default_dtype()).log()
        if not log_std.isfinite().all():
            raise ArgumentError(f"std must be positive and finite, and is {std!r}.")
        if learned:
            self.log_std = nn.Parameter(log_std.detach().clone())
        else:
            self.register_buffer("log_std", log_std.detach())

    @property
    def std(self) -> Tensor:
        """The standard deviation of the noise, as it is now."""
        return self.log_std.exp()

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        _check("GaussianNLL", output, target)
        self._check_std("target", target)
        log_std = at_least_float32(self.log_std)
        scaled = (at_least_float32(target) - at_least_float32(output)) * (-log_std).exp()
        return (scaled.square() / 2 + log_std).mean() + _HALF_LOG_TAU

    def likelihood(self, class_dim: int | None = None) -> Likelihood:
        """What the output means: the mean of a Gaussian with the std that the noise has now."""
        return OfFunction(self._distribution, class_dim)

    def _distribution(self, output: Any) -> Normal:
        check_tensor("GaussianNLL: the output", output, "Choose one with output=.")
        self._check_std("output", output)
        std = at_least_float32(self.std.detach()).to(output.device)
        return Normal(at_least_float32(output), std, validate_args=False)

    def _check_std(self, name: str, value: Tensor) -> None:
        if not _broadcasts(self.log_std.shape, value.shape):
            raise ArgumentError(
                f"GaussianNLL has a std of shape {tuple(self.log_std.shape)}, which does not broadcast to the {name}'s "
                f"{tuple(value.shape)}."
            )

    def extra_repr(self) -> str:
        return f"learned={isinstance(self.log_std, nn.Parameter)}"


class HeteroscedasticGaussianNLL(nn.Module):
    """The NLL of a regression that predicts its own noise: the output is a pair (mean, variance).

    -log N(y; f, v) = (y - f)² / 2v + ½ log v + ½ log 2π

    The network has to make the variance positive,
    with ``softplus(raw) + floor`` or ``raw.exp()``; nothing is clamped here, since predictions would not know of it.
    Both have the shape of the target, and after ``bnn.sample`` a dimension of draws in front.

    Raises:
        ArgumentTypeError: The output is not a pair of tensors, or the target no tensor.
        ArgumentError: The shapes do not fit.

    References:
        Nix, Weigend 1994, "Estimating the mean and variance of the target probability distribution".

    Example::

        >>> nll = HeteroscedasticGaussianNLL()
        >>> nll((torch.zeros(5), torch.ones(5)), torch.zeros(5))  # ½ log 2π
        tensor(0.9189)
    """

    def forward(self, output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        mean, variance = as_pair(output, "HeteroscedasticGaussianNLL")
        for part in (mean, variance):
            _check("HeteroscedasticGaussianNLL", part, target)
        if mean.shape != variance.shape:
            _refuse("HeteroscedasticGaussianNLL", mean, target, f"and a variance of shape {tuple(variance.shape)}")
        mean, variance, target = at_least_float32(mean), at_least_float32(variance), at_least_float32(target)
        return ((target - mean).square() / variance + variance.log()).mean() / 2 + _HALF_LOG_TAU

    def likelihood(self, class_dim: int | None = None) -> Likelihood:
        """What the output means."""
        return GaussianPair(class_dim)


_HALF_LOG_TAU = math.log(2 * math.pi) / 2


def _check(criterion: str, output: Tensor, target: Tensor) -> None:
    """Refuse shapes that would broadcast to something else, such as (B, 1) against (B,), which gives (B, B)."""
    _check_tensors(criterion, output, target)
    drawn = target.ndim > 0 and output.shape[1:] == target.shape
    if output.shape != target.shape and not drawn:
        _refuse(criterion, output, target)


def _check_tensors(criterion: str, output: Any, target: Any) -> None:
    check_tensor(f"{criterion}: the output", output, "Of a converted model pass the first of output, kl = bnn(x).")
    check_tensor(f"{criterion}: the target", target)


def _refuse(criterion: str, output: Tensor, target: Tensor, found: str = "") -> None:
    found = " ".join(filter(None, [f"an output of shape {tuple(output.shape)}", found]))
    classes = " and a dimension of classes" if criterion == "CategoricalNLL" else ""
    raise ArgumentError(
        f"{criterion} got {found} for a target of shape {tuple(target.shape)}. The output must have the shape of the "
        f"target{classes}, after `bnn.sample` with the draws as a further dimension in front."
    )


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    """Tell whether ``shape`` broadcasts to exactly ``to``."""
    sizes = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(size in (1, wanted) for size, wanted in sizes)
