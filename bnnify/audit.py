"""Which Bayesian parameters of a converted model its output really depends on."""

__all__ = ["Audit", "audit"]

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .draw import Draw
from .errors import DrawError
from .model import BayesianModel
from .outputs import remember, tensors_in
from .parameters import bayesian_parameters
from .prediction import evaluating


@dataclass(frozen=True)
class Audit:
    """What one forward in eval mode did with each Bayesian parameter, a tied one under the first of its names.

    Attributes:
        reached: The output has a gradient with respect to the sample of these.
        unreached: It has none: they were not used, or only where no gradient flows. Their noise does nothing, and of
            the loss only the KL trains them.
        replaced: Somebody had put another value in the place of the parameter (``functional_call``, a hypernetwork) and
            the forward read that one. Of a tied parameter, the place is named where it was done.
    """

    reached: tuple[str, ...]
    unreached: tuple[str, ...]
    replaced: tuple[str, ...]

    def __bool__(self) -> bool:
        """Whether there is something to report: a parameter that is unreached or replaced."""
        return bool(self.unreached or self.replaced)

    def __str__(self) -> str:
        count = len(self.reached) + len(self.unreached)
        lines = [f"{len(self.reached)} of {count} Bayesian parameters reach the output"]
        lines += [f"  unreached: {name}" for name in self.unreached]
        lines += [f"  replaced by another value: {name}" for name in self.replaced]
        return "\n".join(lines)


def audit(bnn: BayesianModel, *args: Any, **kwargs: Any) -> Audit:
    """Name every Bayesian parameter that does not reach the output, or whose value somebody replaces during a forward.

    One draw is made and the model is called once with the arguments, in eval mode and with gradients; nothing is
    trained, and every flag is as before afterwards. What a model uses in training alone (an auxiliary head) is
    therefore named as unreached.

    Args:
        bnn: A converted model.
        *args: What the model is called with.
        **kwargs: Likewise.

    Raises:
        DrawError: The output holds no tensor through which gradients flow, so that nothing can be told from it.

    Example::

        >>> bnn = bnnify.convert(nn.Sequential(nn.Linear(3, 2), nn.ReLU()))
        >>> print(bnnify.audit(bnn, torch.ones(1, 3)))
        2 of 2 Bayesian parameters reach the output
    """
    parameters = list(bayesian_parameters(bnn.module))
    names: dict[int, str] = {}
    reached: set[str] = set()
    for parameter in parameters:
        names.setdefault(id(parameter.mean), parameter.name)
        parameter.active.replaced = False
    with evaluating(bnn), torch.enable_grad():
        with Draw(parameters):
            for parameter in parameters:
                sample = getattr(parameter.module, parameter.attribute)
                sample.requires_grad_()  # it does already, unless mean and rho are both frozen
                sample.register_hook(functools.partial(_remember, reached, names[id(parameter.mean)]))
            output = bnn.module(*args, **kwargs)
            remember(output)
        _backward(output, [*bnn.parameters(), *tensors_in((args, kwargs))])
    return Audit(
        reached=tuple(name for name in names.values() if name in reached),
        unreached=tuple(name for name in names.values() if name not in reached),
        replaced=tuple(parameter.name for parameter in parameters if parameter.active.replaced),
    )


def _remember(reached: set[str], name: str, gradient: Tensor) -> None:
    reached.add(name)


def _backward(output: Any, leaves: list[Tensor]) -> None:
    """Run a backward pass through every tensor of ``output`` and leave the gradients of ``leaves`` as they were.

    Not ``torch.autograd.grad``, which would touch no gradient, because re-entrant checkpointing refuses it.
    """
    found = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
    if not found:
        raise DrawError(
            "The output holds no tensor with a gradient, so that an audit cannot tell what it depends on. "
            "Audit a forward that returns logits or values, not decisions made from them."
        )
    leaves = [leaf for leaf in leaves if leaf.is_leaf]
    before = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    try:
        torch.autograd.backward(found, [torch.ones_like(tensor) for tensor in found])
    finally:
        for leaf, gradient in zip(leaves, before, strict=True):
            leaf.grad = gradient
