"""Find the Bayesian parameters on which the output of a converted model does not depend."""

__all__ = ["Audit", "audit"]

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..draws.draw import Draw
from ..draws.outputs import remember, tensors_in
from ..errors import ArgumentTypeError, DrawError, describe
from ..model import BayesianModel, check_converted
from ..modules.parameters import bayesian_parameters
from ..prediction.batches import called_with
from ..prediction.eval_mode import evaluating


@dataclass(frozen=True)
class Audit:
    """The Bayesian parameters by what one forward in eval mode did with them, a tied one under its first name.

    Attributes:
        reached: The output has a gradient with respect to the sample of these.
        unreached: It has none: they were not used, or only where no gradient flows. Their noise does nothing, and of
            the loss only the KL trains them.
        replaced: The forward read another value in the place of the parameter (``functional_call``, a hypernetwork). Of
            a tied parameter, the place is named where it was done.
        not_optimized: The trainable parameters of the model, ρ and deterministic ones included, that the given
            optimizer does not hold: it was made before the conversion, or for a part of the model. No step moves them.
        not_in_model: The tensors of the optimizer that are no parameters of the model, by their place or name there.
    """

    reached: tuple[str, ...]
    unreached: tuple[str, ...]
    replaced: tuple[str, ...]
    not_optimized: tuple[str, ...] = ()
    not_in_model: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Tell whether anything but reached parameters was found."""
        return bool(self.unreached or self.replaced or self.not_optimized or self.not_in_model)

    def __str__(self) -> str:
        count = len(self.reached) + len(self.unreached)
        lines = [f"{len(self.reached)} of {count} Bayesian parameters reach the output"] if count else []
        lines += [f"  unreached: {name}" for name in self.unreached]
        lines += [f"  replaced by another value: {name}" for name in self.replaced]
        if self.not_optimized or self.not_in_model:
            lines.append("The optimizer and the model do not fit: make it from bnn.parameter_groups(lr=…)")
        lines += [f"  not in the optimizer: {name}" for name in self.not_optimized]
        lines += [f"  not in the model: {name}" for name in self.not_in_model]
        return "\n".join(lines)


def audit(bnn: BayesianModel, *args: Any, optimizer: torch.optim.Optimizer | None = None, **kwargs: Any) -> Audit:
    """Name every Bayesian parameter that does not reach the output, or whose value is replaced during a forward.

    The model is called once with the arguments, under one draw, in eval mode and with gradients; nothing is trained,
    and every flag is as before afterwards. A part that is used in training alone (an auxiliary head) is unreached.

    Args:
        bnn: A converted model.
        *args: What the model is called with.
        optimizer: Name, too, the trainable parameters of ``bnn`` that it does not hold, and those it holds that are not
            of ``bnn``. Without other arguments this alone is done, and the model is not called. (A model that takes an
            ``optimizer`` itself gets it by position.) Default: none.
        **kwargs: What the model is called with.

    Raises:
        DrawError: The output holds no tensor with a gradient.
        ArgumentTypeError: ``bnn`` is no converted model, or ``optimizer`` no optimizer.

    Example::

        >>> bnn = bnnify.convert(nn.Sequential(nn.Linear(3, 2), nn.ReLU()))
        >>> print(bnnify.audit(bnn, torch.ones(1, 3)))
        2 of 2 Bayesian parameters reach the output
    """
    check_converted("audit", bnn)
    not_optimized, not_in_model = ((), ()) if optimizer is None else _compare(bnn, optimizer)
    if optimizer is not None and not args and not kwargs:
        return Audit((), (), (), not_optimized, not_in_model)
    parameters = list(bayesian_parameters(bnn.module))
    names: dict[int, str] = {}
    reached: set[str] = set()
    for parameter in parameters:
        names.setdefault(id(parameter.mean), parameter.name)
        parameter.active.replaced = False
    with evaluating(bnn), torch.enable_grad():
        with Draw(parameters), called_with(bnn.module, (args, kwargs)):
            for parameter in parameters:
                sample = getattr(parameter.module, parameter.attribute)
                sample.requires_grad_()  # it does already, unless mean and rho are both frozen
                name = names[id(parameter.mean)]
                sample.register_hook(lambda _, name=name: reached.add(name))
            output = bnn.module(*args, **kwargs)
            remember(output)
        _backward(output, [*bnn.parameters(), *tensors_in((args, kwargs))])
    return Audit(
        reached=tuple(name for name in names.values() if name in reached),
        unreached=tuple(name for name in names.values() if name not in reached),
        replaced=tuple(parameter.name for parameter in parameters if parameter.active.replaced),
        not_optimized=not_optimized,
        not_in_model=not_in_model,
    )


def _compare(bnn: BayesianModel, optimizer: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Name the trainable parameters that an optimizer does not hold, and those it holds that are not the model's."""
    groups = getattr(optimizer, "param_groups", None)
    if not isinstance(groups, list):
        raise ArgumentTypeError(f"audit(optimizer) takes a torch.optim.Optimizer, not {describe(optimizer)}.")
    own = {id(parameter) for parameter in bnn.parameters()}
    held = {id(parameter) for group in groups for parameter in group["params"]}
    missing = (name for name, p in bnn.module.named_parameters() if p.requires_grad and id(p) not in held)
    foreign = (
        group["param_names"][i] if "param_names" in group else f"group {number}, parameter {i}, {describe(parameter)}"
        for number, group in enumerate(groups)
        for i, parameter in enumerate(group["params"])
        if id(parameter) not in own
    )
    return tuple(missing), tuple(foreign)


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
