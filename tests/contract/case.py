"""One model of the contract, and what several promises need of it and of its conversion."""

__all__ = ["Case", "Gradient", "Inputs", "Step", "Subject", "seed"]

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import bnnify
from bnnify.distributions.gaussian import std
from bnnify.modules.parameters import BayesianParameter, bayesian_parameters

from . import outputs

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A model and inputs for it.

    Attributes:
        name: As its library calls it.
        build: Makes the model with random weights; called under a fixed seed.
        inputs: Makes ``(args, kwargs)`` of one forward in eval, given the model; called under a fixed seed, small.
        train_inputs: The same for one forward in train, where that takes others (a detector's targets). Default:
            ``inputs``.
        refuses: Whether ``convert`` must raise a ConversionError. Default: ``False``.
        settings: Further keyword arguments of ``convert``, such as ``select``. Default: none.
        trains: Whether the model's own forward works in train. Default: ``True``.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[nn.Module], Inputs]
    train_inputs: Callable[[nn.Module], Inputs] | None = None
    refuses: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    trains: bool = True


class Subject:
    """A model, its conversion, and what several promises need of both.

    It holds the weights three times (the original's, means and ρ), a promise for its duration at most twice more.

    Attributes:
        case: What is examined.
        plain: The original, with weights that a random initialisation left at one value stirred: behind a zero or a
            layer scale of 1e-6 no bypass of a sample would be seen.
        bnn: Its conversion, with ρ that differs between the elements; made by the promise ``converts``.
        second: Another conversion; made by the promise ``σ → 0`` and used up by ``state_dict``.
        hooks: Forward hooks that both have until the promise ``hooks``, and what they have noted of their calls.
    """

    bnn: bnnify.BayesianModel
    second: bnnify.BayesianModel
    hooks: "Hooks"

    def __init__(self, case: Case) -> None:
        self.case = case
        seed()
        self.plain = case.build()
        if case.refuses:
            return
        set_training(self.plain, False)
        _stir(self.plain)
        with torch.no_grad():
            self.reference = self.run(self.plain)
        self.random_state = torch.get_rng_state()

    def run(self, model: nn.Module, train: bool = False) -> Any:
        """The output of a model; inputs, buffers and every random number in its forward are the same at each call."""
        make = (self.case.train_inputs if train else None) or self.case.inputs
        seed()
        args, kwargs = make(self.plain)
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        seed()
        found = model(*args, **kwargs)
        for buffer, before in buffers:
            if not torch.equal(buffer, before):
                buffer.data.copy_(before)  # past autograd, which has yet to look at running statistics
        return found

    def convert(self, **settings: Any) -> bnnify.BayesianModel:
        return bnnify.convert(self.plain, **{**self.case.settings, **settings})

    @contextlib.contextmanager
    def original_at_the_sample(self) -> Iterator[nn.Module]:
        """The original with the weights that the converted model has in the present draw."""
        before: dict[Tensor, tuple[Tensor, bool]] = {}
        for parameter in bayesian_parameters(self.bnn.module):
            original = self.plain.get_parameter(parameter.name)
            before.setdefault(original, (original.data, original.requires_grad))
            drawn = getattr(parameter.module, parameter.attribute)
            original.data = drawn.detach()
            original.requires_grad_(drawn.requires_grad)  # on which `torch.matmul` lets its way of computing depend
        set_training(self.plain, self.plain.training)  # some drop here what they have cached of their weights
        try:
            yield self.plain
        finally:
            for original, (data, requires_grad) in before.items():
                original.data = data
                original.requires_grad_(requires_grad)
            set_training(self.plain, self.plain.training)

    @cached_property
    def drawn(self) -> Any:
        """Output and KL of the converted model under the seed of :meth:`run`."""
        with torch.no_grad():
            return self.run(self.bnn)

    @cached_property
    def step(self) -> "Step":
        """One forward and backward in a draw, and the same of the original with the weights of that draw."""
        train = self.case.trains
        set_training(self.bnn.module, train)
        set_training(self.plain, train)
        with self.bnn.draw():
            with self.original_at_the_sample() as plain:
                expected = self.run(plain, train)
                wanted = _gradients(plain, outputs.loss(expected))
                expected = _detached(expected)
            found = self.run(self.bnn.module, train)
            for_rho = {p.name: _rho_factor(p) for p in bayesian_parameters(self.bnn.module)}
        got = _gradients(self.bnn.module, outputs.loss(found))
        return Step(outputs.difference(_detached(found), expected), wanted, got, for_rho)


class Hooks:
    """A forward hook on every layer of a model, which its copies and conversions share.

    Attributes:
        called: The (original) class of each module that was called, in order.
    """

    def __init__(self, model: nn.Module) -> None:
        self.called: list[type[nn.Module]] = []
        # How often a weight is computed is the business of whoever reads it.
        modules = [module for name, module in model.named_modules() if "parametrizations" not in name]
        self._ids = {module.register_forward_hook(self._note).id for module in modules}

    def __deepcopy__(self, memo: Any) -> "Hooks":
        return self

    def remove_from(self, model: nn.Module) -> None:
        for module in model.modules():
            for hook in self._ids & module._forward_hooks.keys():
                del module._forward_hooks[hook]

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        self.called.append(getattr(type(module), "_plain_class", type(module)))


@dataclass(frozen=True)
class Gradient:
    """What is remembered of a gradient: a thousand of its elements at the most, and whether they are finite."""

    elements: Tensor
    finite: bool
    largest: float


@dataclass(frozen=True)
class Step:
    """A forward and backward in a draw beside those of the original with the weights of that draw.

    Attributes:
        difference: Between the two outputs.
        wanted: The original's gradients, by the name of the parameter.
        got: The converted model's.
        for_rho: ∂w/∂ρ of each Bayesian parameter, by its name, and by how much rounding may have it wrong.
    """

    difference: str
    wanted: dict[str, Gradient]
    got: dict[str, Gradient]
    for_rho: dict[str, tuple[Tensor, Tensor]]


def seed() -> None:
    """Seed every generator that a forward may use."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def set_training(model: nn.Module, training: bool) -> None:
    """Set the mode; of an exported program, which refuses that, the flags of its modules alone."""
    try:
        model.train(training)
    except NotImplementedError:
        for module in model.modules():
            module.training = training


def _stir(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.numel() and parameter.min() == parameter.max():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def _gradients(model: nn.Module, loss: Tensor) -> dict[str, Gradient]:
    """A digest of each gradient, which is dropped as soon as it is complete."""
    found: dict[str, Gradient] = {}

    def record(name: str, parameter: Tensor) -> None:
        gradient = parameter.grad.to_dense()
        elements, largest = _thinned(gradient).clone(), gradient.abs().max().item()
        earlier = found.get(name)  # re-entrant checkpointing accumulates a parameter's gradient in parts
        if earlier is not None:
            elements, largest = elements + earlier.elements, largest + earlier.largest
        finite = bool(gradient.isfinite().all()) and (earlier is None or earlier.finite)
        found[name] = Gradient(elements, finite, largest)
        parameter.grad = None

    with contextlib.ExitStack() as stack:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                hook = parameter.register_post_accumulate_grad_hook(lambda p, name=name: record(name, p))
                stack.callback(hook.remove)
        loss.backward()
    return found


def _rho_factor(parameter: BayesianParameter) -> tuple[Tensor, Tensor]:
    """∂w/∂ρ = ε·sigmoid(ρ) of the present draw, in the elements that :func:`_thinned` keeps, and its error."""
    drawn = getattr(parameter.module, parameter.attribute)
    rounding = torch.finfo(drawn.dtype).eps
    drawn, mean, rho = (_thinned(tensor.detach()).double() for tensor in (drawn, parameter.mean, parameter.rho))
    factor = (drawn - mean) / std(rho) * rho.sigmoid()
    return factor, rounding * (drawn.abs() / std(rho) * rho.sigmoid() + 4 * factor.abs())


def _thinned(tensor: Tensor) -> Tensor:
    return tensor.flatten()[:: max(1, tensor.numel() // 1000)]


def _detached(output: Any) -> list[Any]:
    detached = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in outputs.leaves(output)]
    return [outputs.structure(output), detached]
