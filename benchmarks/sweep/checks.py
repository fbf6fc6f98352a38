"""What is asked of every model of the sweep: each check is a function of one model that raises where it fails."""

__all__ = ["CHECKS", "Outcome", "examine"]

import contextlib
import copy
import pickle
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import bnnify
from bnnify.distributions.gaussian import std
from bnnify.modules.parameters import bayesian_parameters, settings_of

from . import outputs
from .families import Specimen

PRIOR = bnnify.Gaussian(mean=0.0, std=1.0)
"""Not the default, under which the KL of a fresh conversion is zero and every parameter is kept twice."""


@dataclass(frozen=True)
class Outcome:
    """How one check went.

    Attributes:
        check: Its name, a key of ``CHECKS``, or ``"original"`` where the original model already fails.
        status: ``"pass"``, ``"fail"`` or ``"n/a"``.
        detail: What was found, or why the check does not apply.
        seconds: How long it took.
    """

    check: str
    status: str
    detail: str
    seconds: float


class Failure(Exception):
    """The converted model breaks a promise."""


class NotApplicable(Exception):
    """The original does not do what the check asks of the converted model."""


class Subject:
    """A model, its conversion, and what several checks need of both.

    It holds the weights three times (the original's, means and ρ), a check for its duration at most twice more.

    Attributes:
        specimen: What is examined.
        plain: The original, with weights that a random initialisation left at one value stirred: behind a zero or a
            layer scale of 1e-6 no bypass of a sample would be seen.
        bnn: Its conversion, with ρ that differs between the elements; made by the check ``converts``.
        second: Another conversion; made by the check ``σ → 0`` and used up by ``state_dict``.
        hooks: Forward hooks that both have until the check ``hooks``, and what they have noted of their calls.
    """

    bnn: bnnify.BayesianModel
    second: bnnify.BayesianModel | None = None
    hooks: "Hooks"

    def __init__(self, specimen: Specimen) -> None:
        self.specimen = specimen
        seed()
        self.plain = specimen.build().eval()
        if not specimen.refuses:
            _stir(self.plain)
            with torch.no_grad():
                self.reference = self.run(self.plain)
            self.random_state = torch.get_rng_state()

    def run(self, model: nn.Module, train: bool = False) -> Any:
        """The output of a model; the inputs and every random number in its forward are the same at each call."""
        make = (self.specimen.train_inputs if train else None) or self.specimen.inputs
        seed()
        args, kwargs = make(self.plain)
        seed()
        return model(*args, **kwargs)

    def convert(self, **settings: Any) -> bnnify.BayesianModel:
        return bnnify.convert(self.plain, **{"prior": PRIOR, **self.specimen.settings, **settings})

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
        self.plain.train(self.plain.training)  # some drop here what they have cached of their weights
        try:
            yield self.plain
        finally:
            for original, (data, requires_grad) in before.items():
                original.data = data
                original.requires_grad_(requires_grad)
            self.plain.train(self.plain.training)

    @cached_property
    def step(self) -> "Step":
        """One forward and backward in a draw, and the same of the original with the weights of that draw."""
        train = self.specimen.trains
        self.bnn.train(train)
        self.plain.train(train)
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
    """A forward hook on every module of a model, which its copies and conversions share.

    Attributes:
        called: The (original) class of each module that was called, in order.
    """

    def __init__(self, model: nn.Module) -> None:
        self.called: list[type[nn.Module]] = []
        self._ids = {module.register_forward_hook(self._note).id for module in model.modules()}

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
        for_rho: ∂w/∂ρ of each Bayesian parameter, by its name.
    """

    difference: str
    wanted: dict[str, Gradient]
    got: dict[str, Gradient]
    for_rho: dict[str, Tensor]


def sigma_to_zero(subject: Subject) -> None:
    """With σ = 1e-30 a draw has the output of the original, and its structure."""
    # Small enough to leave every weight but a zero as it is: a detector turns a change of 1e-12 into one of 1e-4.
    subject.second = bnn = subject.convert(posterior_std=1e-30)
    with torch.no_grad():
        output, kl = subject.run(bnn)
        _refute(outputs.difference(output, subject.reference, tolerance=1e-4))
        _refute("" if torch.equal(kl, bnn.kl()) else "the KL of the forward is not that of the model")


def converts(subject: Subject) -> str:
    """It converts, and the report has every parameter; or it refuses with a ConversionError, where it must."""
    if subject.specimen.refuses:
        try:
            subject.convert()
        except bnnify.ConversionError as error:
            return str(error)
        raise Failure("it converted, but must refuse")
    subject.hooks = Hooks(subject.plain)
    bnn = subject.convert()
    names = {name for name, _ in subject.plain.named_parameters()}
    _refute("" if {entry.name for entry in bnn.report.entries} == names else "the report lacks parameters")
    for parameter in bayesian_parameters(bnn.module):
        with torch.no_grad():
            parameter.rho.add_(torch.randn_like(parameter.rho), alpha=0.1)
    subject.bnn = bnn
    weights = sum(entry.numel for entry in bnn.report.bayesian)
    total = sum(entry.numel for entry in bnn.report.entries)
    return f"{len(bnn.report.bayesian)} of {len(names)} parameters, {weights / total:.1%} of {total:,} weights"


def outside_a_draw(subject: Subject) -> None:
    """Outside a draw it computes what the original does, bit for bit, with the same structure and random numbers."""
    with torch.no_grad():
        found = subject.run(subject.bnn.module)
    _refute("" if torch.equal(torch.get_rng_state(), subject.random_state) else "it uses other random numbers")
    _refute(outputs.difference(found, subject.reference))


def draw_in_eval(subject: Subject) -> None:
    """In eval under no_grad a draw is the original with the sampled weights, bit for bit, and leaves nothing behind."""
    with torch.no_grad():
        # As `predict` draws. `bnn.draw()` adds hooks, with which attention layers leave their fast path.
        with bnnify.Draw(bayesian_parameters(subject.bnn.module)):
            for parameter in bayesian_parameters(subject.bnn.module):
                same = (getattr(parameter.module, parameter.attribute) == parameter.mean).float().mean()
                _refute(f"the sample of {parameter.name} is its mean" if same > 0.01 else "")
            found = subject.run(subject.bnn.module)
            with subject.original_at_the_sample() as plain:
                _refute(outputs.difference(found, subject.run(plain)))
            _refute("" if outputs.difference(found, subject.reference) else "the draw has the output of the mean")
        left = outputs.difference(subject.run(subject.bnn.module), subject.reference)
        _refute(f"after the draw: {left}" if left else "")


def draw_in_train(subject: Subject) -> None:
    """In train a draw is the original with the sampled weights, bit for bit."""
    if not subject.specimen.trains:
        raise NotApplicable("the original has no forward in train")
    _refute(subject.step.difference)


def gradients(subject: Subject) -> str:
    """Mean and ρ get the gradient of the sample, the latter times ∂w/∂ρ, wherever the original has a gradient."""
    step = subject.step
    for name, wanted in step.wanted.items():
        if subject.plain.get_parameter(name).requires_grad:
            _refute("" if name in step.got else f"{name} has no gradient")
            _refute_gradient(name, step.got[name], wanted.elements, wanted)
    _refute("".join(f"{name} has a gradient" for name in step.got.keys() - step.wanted.keys() if name[-4:] != "_rho"))
    reached = 0
    for name, factor in step.for_rho.items():
        wanted, got = step.wanted.get(name), step.got.get(f"{name}_rho")
        if (wanted is None) != (got is None):
            raise Failure(f"{name}_rho has {'no' if got is None else 'a'} gradient, unlike the original")
        if wanted is not None and got is not None:
            reached += 1
            _refute_gradient(f"{name}_rho", got, wanted.elements * factor, wanted)
            silent = wanted.elements.any() and not got.elements.any()
            _refute(f"the gradient of {name}_rho is zero" if silent else "")
    return f"{reached} of {len(step.for_rho)} Bayesian parameters"


def kl(subject: Subject) -> None:
    """The KL is the sum over unique parameters of what torch.distributions has for them."""
    prior = torch.distributions.Normal(torch.tensor(PRIOR.mean).double(), torch.tensor(PRIOR.std).double())
    expected = 0.0
    with torch.no_grad():
        for parameter in {id(p.mean): p for p in bayesian_parameters(subject.bnn.module)}.values():
            pieces = (tensor.flatten().split(1 << 16) for tensor in (parameter.mean, parameter.rho))
            for mean, rho in zip(*pieces, strict=True):
                posterior = torch.distributions.Normal(mean.double(), std(rho.double()))
                expected += torch.distributions.kl_divergence(posterior, prior).sum().item()
        found = subject.bnn.kl().item()
    _refute("" if abs(found - expected) <= 1e-4 * expected else f"the KL is {found:.6e} instead of {expected:.6e}")


def state_dict(subject: Subject) -> None:
    """The state_dict of one conversion loads into another one, whose weights and σ were others."""
    second, subject.second = subject.second, None
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(1.5)
    bnnify.load_weights(second, subject.bnn.module.state_dict())
    _refute_same(subject, second)


def pickles(subject: Subject) -> None:
    """A pickle is read back as the same model."""
    with tempfile.TemporaryFile() as file:
        try:
            pickle.dump(subject.bnn, file)
        except Exception:
            with _not_applicable_if_the_original("pickles"):
                pickle.dumps(subject.plain)
            raise
        file.seek(0)
        other = pickle.load(file)
    _refute_same(subject, other)


def deepcopies(subject: Subject) -> None:
    """A deep copy is the same model, and shares no parameter with it."""
    other = copy.deepcopy(subject.bnn)
    shared = {id(p) for p in other.parameters()} & {id(p) for p in subject.bnn.parameters()}
    _refute("the copy shares parameters" if shared else "")
    _refute_same(subject, other)


def collapses(subject: Subject) -> None:
    """Collapse gives back the original: its classes, its keys and its bits."""
    plain = bnnify.collapse(subject.bnn)
    for (name, module), original in zip(plain.named_modules(), subject.plain.modules(), strict=True):
        _refute("" if type(module) is type(original) else f"`{name}` is a {type(module).__name__}")
    _refute_state(plain, subject.plain)
    ties = [[n for n, _ in m.named_parameters()] for m in (plain, subject.plain)]
    _refute("" if ties[0] == ties[1] else "its parameters are tied in another way")


def survives(subject: Subject) -> None:
    """In bfloat16, with modules in train and in eval and a frozen parameter: flags, keys, dtype and device stay."""
    model = copy.deepcopy(subject.plain).to(torch.bfloat16)
    for number, module in enumerate(model.modules()):
        module.training = number % 2 == 0
    if len(subject.bnn.report.bayesian) > 1:
        model.get_parameter(subject.bnn.report.bayesian[0].name).requires_grad_(False)
    modules = [(name, module, type(module), module.training) for name, module in model.named_modules()]
    tensors = {name: _flags(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    bnn = bnnify.convert(model, **{"prior": PRIOR, **subject.specimen.settings}, inplace=True)
    for name, module, cls, training in modules:
        kept = bnn.module.get_submodule(name) is module and isinstance(module, cls) and module.training is training
        _refute("" if kept else f"`{name}` is not the module that it was")
    state = bnn.module.state_dict(keep_vars=True)
    added = {
        f"{name}.{attribute}_rho".removeprefix(".")
        for name, module in bnn.module.named_modules(remove_duplicate=False)
        for attribute in settings_of(module)
    }
    _refute("" if state.keys() == tensors.keys() | added else "the state_dict has other keys")
    for name, flags in tensors.items():
        _refute("" if _flags(state[name]) == flags else f"{name} was {flags}, and is {_flags(state[name])}")
    for parameter in bayesian_parameters(bnn.module):
        same = (parameter.rho.dtype, parameter.rho.device) == (parameter.mean.dtype, parameter.mean.device)
        _refute("" if same and parameter.rho.requires_grad else f"{parameter.name}_rho is {_flags(parameter.rho)}")


def hooks(subject: Subject) -> str:
    """A forward hook on every module, put there before the conversion, fires in the same order as in the original."""
    try:
        with torch.no_grad():
            called = []
            for model in (subject.plain, subject.bnn.module):
                subject.hooks.called.clear()
                subject.run(model)
                called.append(list(subject.hooks.called))
    finally:
        subject.hooks.remove_from(subject.plain)
        subject.hooks.remove_from(subject.bnn.module)
    _refute(
        "" if called[0] == called[1] else f"{len(called[1])} calls were seen instead of {len(called[0])}, or others"
    )
    return f"{len(called[0])} calls"


CHECKS: dict[str, Callable[[Subject], str | None]] = {
    "converts": converts,
    "outside a draw": outside_a_draw,
    "σ → 0": sigma_to_zero,
    "draw in eval": draw_in_eval,
    "draw in train": draw_in_train,
    "gradients": gradients,
    "KL": kl,
    "state_dict": state_dict,
    "pickle": pickles,
    "deepcopy": deepcopies,
    "collapse": collapses,
    "flags": survives,
    "hooks": hooks,
}

# What takes a second conversion or hooks comes early, and training, which moves running statistics, at the end.
_FIRST, _LAST = ("σ → 0", "converts", "state_dict", "hooks"), ("draw in train", "gradients")
_ORDER = (*_FIRST, *(name for name in CHECKS if name not in _FIRST + _LAST), *_LAST)


def examine(specimen: Specimen) -> Iterator[Outcome]:
    """Run every check on one model; yields each outcome as it is known."""
    start = time.perf_counter()
    try:
        subject = Subject(specimen)
    except Exception as error:
        yield Outcome("original", "fail", _described(error), time.perf_counter() - start)
        return
    yield Outcome(
        "original",
        "pass",
        f"{sum(p.numel() for p in subject.plain.parameters()):,} weights",
        time.perf_counter() - start,
    )
    for name in ("converts",) if specimen.refuses else _ORDER:
        start = time.perf_counter()
        try:
            status, detail = "pass", CHECKS[name](subject) or ""
        except NotApplicable as reason:
            status, detail = "n/a", str(reason)
        except Exception as error:
            status, detail = "fail", _described(error)
        yield Outcome(name, status, detail, time.perf_counter() - start)
        if name == "converts" and status == "fail":
            return


def seed() -> None:
    """Seed every generator that a forward may use."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


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


def _rho_factor(parameter: Any) -> Tensor:
    """∂w/∂ρ = ε·sigmoid(ρ) of the present draw, in the elements that :func:`_thinned` keeps."""
    drawn = getattr(parameter.module, parameter.attribute)
    drawn, mean, rho = (_thinned(tensor.detach()).double() for tensor in (drawn, parameter.mean, parameter.rho))
    return (drawn - mean) / std(rho) * rho.sigmoid()


def _thinned(tensor: Tensor) -> Tensor:
    return tensor.flatten()[:: max(1, tensor.numel() // 1000)]


def _refute(failure: str) -> None:
    if failure:
        raise Failure(failure)


def _refute_gradient(name: str, got: Gradient, elements: Tensor, wanted: Gradient) -> None:
    _refute(f"the gradient of {name} is not finite" if wanted.finite and not got.finite else "")
    if wanted.finite:
        gap = (got.elements.double() - elements.double()).abs().max().item()
        _refute(f"the gradient of {name} is off by {gap:.1e}" if gap > 1e-3 * wanted.largest else "")


def _refute_same(subject: Subject, other: bnnify.BayesianModel) -> None:
    _refute_state(other.module, subject.bnn.module)
    with torch.no_grad():
        _refute(outputs.difference(subject.run(other.module.eval()), subject.reference))


def _refute_state(model: nn.Module, expected: nn.Module) -> None:
    ours, theirs = model.state_dict(), expected.state_dict()
    _refute("" if list(ours) == list(theirs) else "the state_dict has other keys")
    for name, tensor in theirs.items():
        if isinstance(tensor, Tensor):
            _refute("" if not outputs.difference(ours[name], tensor) else f"{name} has other values")


def _flags(tensor: Any) -> Any:
    return (tensor.dtype, tensor.device, tensor.requires_grad) if isinstance(tensor, Tensor) else type(tensor)


def _detached(output: Any) -> list[Any]:
    detached = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in outputs.leaves(output)]
    return [outputs.structure(output), detached]


@contextlib.contextmanager
def _not_applicable_if_the_original(verb: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise NotApplicable(f"neither {verb} the original: {_described(error)}") from None


def _described(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, Failure) else f"{type(error).__name__}: {text}"
