"""What every converted model promises: each promise is a function of one subject, and raises where it is broken."""

__all__ = ["CHECKS"]

import copy
import pickle
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import bnnify
from bnnify.convert import DEFAULTS
from bnnify.distributions.gaussian import std
from bnnify.draws.companions import INITIAL_STD, PRIOR_MEAN, RHO
from bnnify.modules.parameters import bayesian_parameters
from bnnify.modules.settings import slots_of

from . import outputs
from .case import Hooks, Subject
from .comparisons import (
    Failure,
    NotApplicable,
    copy_of,
    flags_of,
    identity_of,
    not_applicable_if_the_original,
    refute,
    refute_gradient,
    refute_same,
    refute_state,
)


def sigma_to_zero(subject: Subject) -> None:
    """With σ = 1e-30 a draw has the output of the original, and its structure."""
    # Small enough to leave every weight but a zero as it is: a detector turns a change of 1e-12 into one of 1e-4.
    prior = subject.case.settings.get("prior", DEFAULTS.prior)  # beside a σ that is given the default is another one
    subject.second = bnn = subject.convert(posterior_std=1e-30, prior=prior)
    with torch.no_grad():
        output, kl = subject.run(bnn)
        refute(outputs.difference(output, subject.reference, tolerance=1e-4))
        refute("" if torch.equal(kl, bnn.kl()) else "the KL of the forward is not that of the model")


def converts(subject: Subject) -> str:
    """It converts a copy, and the report has every parameter; or it refuses with a ConversionError, where it must."""
    if subject.case.refuses:
        try:
            subject.convert()
        except bnnify.ConversionError as error:
            return str(error)
        raise Failure("it converted, but must refuse")
    subject.hooks = Hooks(subject.plain)
    before = identity_of(subject.plain)
    bnn = subject.convert()
    refute("" if identity_of(subject.plain) == before else "the original is another model now")
    names = {name for name, _ in subject.plain.named_parameters()}
    refute("" if {entry.name for entry in bnn.report.entries} == names else "the report lacks parameters")
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
    refute("" if torch.equal(torch.get_rng_state(), subject.random_state) else "it uses other random numbers")
    refute(outputs.difference(found, subject.reference))


def draw_in_eval(subject: Subject) -> None:
    """In eval under no_grad a draw is the original with the sampled weights, bit for bit, and leaves nothing behind."""
    with torch.no_grad():
        # As `predict` draws. `bnn.draw()` adds hooks, with which attention layers leave their fast path.
        with bnnify.Draw(bayesian_parameters(subject.bnn.module)):
            for parameter in bayesian_parameters(subject.bnn.module):
                same = (getattr(parameter.module, parameter.attribute) == parameter.mean).float().mean()
                # In half precision a noise of a tenth of a weight may be lost in rounding.
                most = 0.01 if torch.finfo(parameter.mean.dtype).bits > 16 else 0.5
                refute(f"the sample of {parameter.name} is its mean" if same > most else "")
            found = subject.run(subject.bnn.module)
            with subject.original_at_the_sample() as plain:
                refute(outputs.difference(found, subject.run(plain)))
            refute("" if outputs.difference(found, subject.reference) else "the draw has the output of the mean")
        left = outputs.difference(subject.run(subject.bnn.module), subject.reference)
        refute(f"after the draw: {left}" if left else "")


def draw_in_train(subject: Subject) -> None:
    """In train a draw is the original with the sampled weights, bit for bit."""
    if not subject.case.trains:
        raise NotApplicable("the original has no forward in train")
    refute(subject.step.difference)


def gradients(subject: Subject) -> str:
    """Mean and ρ get the gradient of the sample, the latter times ∂w/∂ρ, wherever the original has a gradient."""
    step = subject.step
    for name, wanted in step.wanted.items():
        if subject.plain.get_parameter(name).requires_grad:
            refute("" if name in step.got else f"{name} has no gradient")
            refute_gradient(name, step.got[name], wanted.elements, wanted)
    refute("".join(f"{name} has a gradient" for name in step.got.keys() - step.wanted.keys() if name[-4:] != "_rho"))
    reached = 0
    for name, (factor, error) in step.for_rho.items():
        wanted, got = step.wanted.get(name), step.got.get(f"{name}_rho")
        if (wanted is None) != (got is None):
            raise Failure(f"{name}_rho has {'no' if got is None else 'a'} gradient, unlike the original")
        if wanted is not None and got is not None:
            reached += 1
            refute_gradient(f"{name}_rho", got, wanted.elements * factor, wanted, wanted.elements.abs() * error)
            silent = wanted.elements.any() and not got.elements.any()
            refute(f"the gradient of {name}_rho is zero" if silent else "")
    return f"{reached} of {len(step.for_rho)} Bayesian parameters"


def kl(subject: Subject) -> None:
    """The KL is the sum over unique parameters of what torch.distributions has for them."""
    expected = 0.0
    with torch.no_grad():
        for parameter in {id(p.mean): p for p in bayesian_parameters(subject.bnn.module)}.values():
            tensors = (parameter.mean, parameter.rho, _prior_mean(parameter).expand_as(parameter.mean))
            prior = parameter.settings.prior
            scale = prior.std if parameter.initial_std is None else prior.scale * parameter.initial_std
            for mean, rho, centre in zip(*(tensor.flatten().split(1 << 16) for tensor in tensors), strict=True):
                posterior = torch.distributions.Normal(mean.double(), std(rho.double()))
                p = torch.distributions.Normal(centre.double(), torch.as_tensor(scale).double())
                expected += torch.distributions.kl_divergence(posterior, p).sum().item()
        found = subject.bnn.kl().item()
    refute("" if abs(found - expected) <= 1e-4 * expected else f"the KL is {found:.6e} instead of {expected:.6e}")


def state_dict(subject: Subject) -> None:
    """The state_dict of one conversion loads into another one, whose weights and σ were others."""
    second = subject.second
    del subject.second
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(1.5)
    bnnify.load_weights(second, subject.bnn.module.state_dict())
    refute_same(subject, second)


def pickles(subject: Subject) -> None:
    """A pickle is read back as the same model, also one that was made in a draw."""
    try:
        with tempfile.TemporaryFile() as file:
            with subject.bnn.draw():
                pickle.dump(subject.bnn, file)
            file.seek(0)
            refute_same(subject, pickle.load(file))
    except Exception:
        with not_applicable_if_the_original("pickles"), torch.no_grad():
            refute(outputs.difference(subject.run(pickle.loads(pickle.dumps(subject.plain))), subject.reference))
        raise


def deepcopies(subject: Subject) -> None:
    """A deep copy is the same model, and shares no parameter with it, also one that was made in a draw."""
    with subject.bnn.draw():
        other = copy.deepcopy(subject.bnn)
    shared = {id(p) for p in other.parameters()} & {id(p) for p in subject.bnn.parameters()}
    refute("the copy shares parameters" if shared else "")
    refute_same(subject, other)


def collapses(subject: Subject) -> None:
    """Collapse gives back the original: its classes, its attributes, its keys and its bits."""
    plain = bnnify.collapse(subject.bnn)
    # torch's own copy of a graph lacks some attributes.
    for (name, module), original in zip(plain.named_modules(), copy_of(subject.plain).modules(), strict=True):
        refute("" if type(module).__name__ == type(original).__name__ else f"`{name}` is a {type(module).__name__}")
        refute("Bayesian" if any("Bayesian" in cls.__name__ for cls in type(module).__mro__) else "")
        odd = vars(module).keys() ^ vars(original).keys()
        refute(f"`{name}` has other attributes: {odd}" if odd else "")
    refute_state(plain, subject.plain)
    ties = [[n for n, _ in m.named_parameters()] for m in (plain, subject.plain)]
    refute("" if ties[0] == ties[1] else "its parameters are tied in another way")
    with torch.no_grad():
        refute(outputs.difference(subject.run(plain), subject.reference))


def survives(subject: Subject) -> None:
    """In bfloat16, with modules in train and in eval and a frozen parameter: flags, keys, dtype and device stay.

    ρ is in float32.
    """
    model = copy_of(subject.plain).to(torch.bfloat16)
    for number, module in enumerate(model.modules()):
        module.training = number % 2 == 0
    if len(subject.bnn.report.bayesian) > 1:
        model.get_parameter(subject.bnn.report.bayesian[0].name).requires_grad_(False)
    modules = [(name, module, type(module), module.training) for name, module in model.named_modules()]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tensors = {name: flags_of(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    bnn = bnnify.convert(model, **subject.case.settings, inplace=True)
    for name, module, cls, training in modules:
        kept = bnn.module.get_submodule(name) is module and isinstance(module, cls) and module.training is training
        refute("" if kept else f"`{name}` is not the module that it was")
    for name, parameter in parameters.items():
        refute("" if bnn.module.get_parameter(name) is parameter else f"{name} is another parameter")
    state = bnn.module.state_dict(keep_vars=True)
    added = {
        f"{name}.{attribute}{ending}".removeprefix(".")
        for name, module in bnn.module.named_modules(remove_duplicate=False)
        for attribute in slots_of(module)
        for ending in (RHO, PRIOR_MEAN, INITIAL_STD)
    }
    rhos = {name for name in added if name.endswith("_rho")}
    refute("" if tensors.keys() | rhos <= state.keys() <= tensors.keys() | added else "the state_dict has other keys")
    for name, flags in tensors.items():
        refute("" if flags_of(state[name]) == flags else f"{name} was {flags}, and is {flags_of(state[name])}")
    for parameter in bayesian_parameters(bnn.module):
        fits = (parameter.rho.dtype, parameter.rho.device) == (torch.float32, parameter.mean.device)
        refute("" if fits and parameter.rho.requires_grad else f"{parameter.name}_rho is {flags_of(parameter.rho)}")


def hooks(subject: Subject) -> str:
    """A forward hook on every module, put there before the conversion, fires in the same order as in the original."""
    try:
        with torch.no_grad():
            called = []
            for model in (copy_of(subject.plain), subject.bnn.module):  # torch's copy of a graph has none
                subject.hooks.called.clear()
                subject.run(model)
                called.append(list(subject.hooks.called))
    finally:
        subject.hooks.remove_from(subject.plain)
        subject.hooks.remove_from(subject.bnn.module)
    refute("" if called[0] == called[1] else f"{len(called[1])} calls were seen instead of {len(called[0])}, or others")
    return f"{len(called[0])} calls"


def _prior_mean(parameter: Any) -> Tensor:
    """What the prior of a parameter is centred on."""
    return torch.as_tensor(parameter.settings.prior.mean) if parameter.prior_mean is None else parameter.prior_mean


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
