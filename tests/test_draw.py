"""Draws: one network each, restored on leaving, one per thread, and put back for recomputation in backward."""

import copy
import gc
import itertools
import threading
import weakref

import pytest
import torch
import zoo
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import bnnify
from bnnify.parameters import bayesian_parameters, unique_bayesian_parameters
from bnnify.posterior import std


def mlp(depth: int = 2) -> bnnify.BayesianModel:
    torch.manual_seed(0)
    return bnnify.convert(nn.Sequential(*[layer for _ in range(depth) for layer in (nn.Linear(4, 4), nn.Tanh())]))


X = torch.linspace(-1, 1, 12).reshape(3, 4)


# What a draw is


def test_a_draw_is_one_network_for_all_reads_and_forwards_in_it():
    bnn = mlp()
    with bnn.draw():
        weight = bnn.module[0].weight
        assert bnn.module[0].weight is weight
        first, second, direct = bnn(X)[0], bnn(X)[0], bnn.module(X)
    assert torch.equal(first, second)
    assert torch.equal(first, direct)
    assert not torch.equal(first, bnn(X)[0])


def test_tied_and_shared_weights_have_one_sample_and_one_rho():
    for name in ("tied_language_model", "used_twice"):
        model, _ = zoo.build(name)
        bnn = bnnify.convert(model)
        first, second = (bnn.module.embed, bnn.module.head) if name.startswith("tied") else (bnn.module.layer,) * 2
        assert first.weight_rho is second.weight_rho
        with bnn.draw():
            assert first.weight is second.weight
            assert first.weight is not first._parameters["weight"]


def test_nested_draws_are_restored_not_cleared():
    bnn = mlp()
    with bnn.draw():
        outer = bnn.module[0].weight
        with bnn.draw():
            assert bnn.module[0].weight is not outer
        assert bnn.module[0].weight is outer
    assert bnn.module[0].weight is bnn.module[0]._parameters["weight"]


def test_a_draw_can_be_entered_again():
    bnn = mlp()
    with bnn.draw() as draw:
        expected = bnn.module(X)
    with draw:
        assert torch.equal(bnn.module(X), expected)


def test_a_converted_part_follows_the_draw_of_the_whole():
    part = mlp()
    whole = bnnify.convert(nn.ModuleDict({"part": part, "rest": nn.Linear(4, 4)}), inplace=True)
    assert len(list(unique_bayesian_parameters(whole.module))) == 6
    with whole.draw():
        weight = part.module[0].weight
        assert torch.equal(part(X)[0], part.module(X))
        assert part.module[0].weight is weight


@pytest.mark.parametrize("where", ["forward", "draw"])
def test_an_exception_leaves_no_draw_in_effect(where):
    bnn = mlp()

    def fail(module: nn.Module, args: tuple) -> None:
        raise RuntimeError("on purpose")

    def call_in_draw(x: torch.Tensor) -> None:
        with bnn.draw():
            bnn.module(x)

    bnn.module[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        (bnn if where == "forward" else call_in_draw)(X)
    assert all(parameter.active.entry is None for parameter in bayesian_parameters(bnn.module))
    assert not bnn.module._forward_hooks


def test_threads_have_draws_of_their_own():
    bnn = mlp()
    barrier, samples, stable = threading.Barrier(3), {}, []

    def work(index: int) -> None:
        with bnn.draw():
            samples[index] = bnn.module[0].weight.detach().clone()
            output = bnn.module(X)
            barrier.wait(timeout=30)
            stable.append(torch.equal(samples[index], bnn.module[0].weight) and torch.equal(output, bnn.module(X)))
            barrier.wait(timeout=30)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    barrier.wait(timeout=30)
    mean = bnn.module[0].weight  # both threads are inside their draws now
    barrier.wait(timeout=30)
    for thread in threads:
        thread.join()
    assert mean is bnn.module[0]._parameters["weight"]
    assert stable == [True, True]
    assert not torch.equal(samples[0], samples[1])


def test_samples_have_the_mean_and_variance_of_the_posterior_and_are_independent():
    bnn = mlp()
    rhos = [parameter.rho for parameter in unique_bayesian_parameters(bnn.module)]
    for index, rho in enumerate(rhos):
        rho.data.normal_(-1.0 + 0.3 * index, 0.5)
    draws = []
    with torch.no_grad():
        for _ in range(4000):
            with bnn.draw():
                weights = [module.weight for module in bnn.module if isinstance(module, nn.Linear)]
                biases = [module.bias for module in bnn.module if isinstance(module, nn.Linear)]
                draws.append(torch.cat([weights[0].flatten(), biases[0], weights[1].flatten(), biases[1]]))
    samples = torch.stack(draws).double()
    mean = torch.cat([p.mean.flatten() for p in unique_bayesian_parameters(bnn.module)]).double()
    sigma = torch.cat([std(rho).flatten() for rho in rhos]).double().detach()
    standard = (samples - mean) / sigma
    # Five standard errors of each estimate at n = 4000 independent draws.
    error = 5 / len(draws) ** 0.5
    assert standard.mean(0).abs().max() < error
    assert (standard.var(0) - 1).abs().max() < error * 2**0.5
    correlation = torch.corrcoef(standard.T) - torch.eye(len(sigma))
    assert correlation.abs().max() < error
    between_draws = (standard[1:] * standard[:-1]).mean(0)
    assert between_draws.abs().max() < error


def test_gradients_do_not_depend_on_what_was_drawn_in_between():
    bnn = mlp()
    torch.manual_seed(1)
    output, _ = bnn(X)
    (expected,) = torch.autograd.grad(output.sum(), bnn.module[0].weight_rho, retain_graph=True)
    bnn(X)
    with bnn.draw():
        bnn.module(X)
        (found,) = torch.autograd.grad(output.sum(), bnn.module[0].weight_rho)
    assert torch.equal(found, expected)


def test_the_output_may_be_edited_in_place():
    bnn = bnnify.convert(nn.Linear(4, 4))
    output, _ = bnn(X)
    output.mul_(2.0).clamp_(min=0.0)
    output.sum().backward()
    assert bnn.module.weight_rho.grad.isfinite().all()


# Values that somebody puts in the place of a parameter


def test_functional_call_with_other_parameters_samples_around_those():
    bnn = mlp()
    values = {name: torch.zeros_like(value) for name, value in bnn.named_parameters()}
    values |= {name: torch.full_like(value, -200.0) for name, value in bnn.named_parameters() if name.endswith("_rho")}
    assert torch.equal(functional_call(bnn, values, (X,))[0], torch.zeros(3, 4))


def test_a_value_swapped_in_during_a_draw_is_given_back_as_it_stands():
    bnn = mlp()
    swapped = torch.zeros(4, 4)
    with bnn.draw():
        output = functional_call(bnn.module, {"0.weight": swapped, "0.bias": torch.zeros(4)}, (X,))
        inner = bnn.module[2].bias
        assert torch.equal(output, torch.tanh(inner).expand(3, 4))


# Activation checkpointing


class Recomputed(nn.Module):
    """Checkpointed blocks, nested on request, whose output is wrapped in ``structure``."""

    def __init__(self, use_reentrant: bool | None, structure: str = "tensor", nested: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.3)) for _ in range(3))
        self.use_reentrant, self.structure, self.nested = use_reentrant, structure, nested

    def maybe_checkpoint(self, function, x):
        return function(x) if self.use_reentrant is None else checkpoint(function, x, use_reentrant=self.use_reentrant)

    def region(self, x):
        for block in self.blocks[:2]:
            x = x + (self.maybe_checkpoint(block, x) if self.nested else block(x))
        return x

    def forward(self, x):
        x = self.maybe_checkpoint(self.region, torch.tanh(self.first(x)))
        x = self.maybe_checkpoint(self.blocks[2], x)
        # Nothing random is left after the last recomputed region: the output's own hooks have to be in time.
        return {
            "tensor": lambda: x,
            "dict": lambda: {"out": {"y": x}},
            "tuple": lambda: (x, [x.detach()]),
            "dataclass": lambda: zoo.Outputs(x, x.detach()),
            "object": lambda: zoo.PlainObject(x, x.detach()),
        }[self.structure]()


def gradients(bnn: bnnify.BayesianModel, how: str) -> list[torch.Tensor]:
    """Of three forwards and one backward."""
    bnn.zero_grad()
    losses = []
    for seed in range(3):
        torch.manual_seed(seed)
        if how == "draw":
            with bnn.draw():
                output = bnn.module(X)
        elif how == "forward_in_draw":
            with bnn.draw():
                output, _ = bnn(X)
        elif how == "sample":
            output = bnn.sample(X, num_samples=1)
        else:
            output, _ = bnn(X)
        losses.append(zoo.tensors(output)[0].square().sum() * (seed + 1))
    torch.stack(losses).sum().backward()
    return [p.grad for p in bnn.parameters() if p.requires_grad and p.grad is not None]


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(
    ("how", "structure"),
    [
        *itertools.product(["forward", "draw", "forward_in_draw"], ["tensor", "dict", "tuple", "dataclass", "object"]),
        ("sample", "tensor"),
        ("sample", "dict"),
    ],
)
def test_checkpointing_gives_the_gradients_of_no_checkpointing(use_reentrant, structure, how):
    expected = gradients(bnnify.convert(Recomputed(None, structure)), how)
    found = gradients(bnnify.convert(Recomputed(use_reentrant, structure)), how)
    assert len(expected) == len(found) == 16
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_nested_checkpointing_gives_the_same_gradients_too(use_reentrant):
    expected = gradients(bnnify.convert(Recomputed(None)), "forward")
    for one, other in zip(
        gradients(bnnify.convert(Recomputed(use_reentrant, nested=True)), "forward"), expected, strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_submodule_called_in_a_draw_gives_the_same_gradients(use_reentrant):
    def gradient(model: nn.Module) -> torch.Tensor:
        bnn = bnnify.convert(nn.ModuleDict({"inner": model}))
        torch.manual_seed(1)
        with bnn.draw():
            output = bnn.module["inner"](X)  # not the root: its own forward is what is hooked
        output.sum().backward()
        return bnn.module["inner"].first.weight_rho.grad

    torch.testing.assert_close(gradient(Recomputed(use_reentrant)), gradient(Recomputed(None)))


class SharedInRegions(nn.Module):
    """A layer that two checkpointed regions use, which autograd therefore reaches more than once."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.shared = nn.Linear(4, 6), nn.Linear(6, 6)
        self.use_reentrant = use_reentrant

    def forward(self, x):
        x = self.first(x)
        for _ in range(2):
            x = (
                torch.tanh(self.shared(x))
                if self.use_reentrant is None
                else checkpoint(lambda x: torch.tanh(self.shared(x)), x, use_reentrant=self.use_reentrant)
            )
        return x


@pytest.mark.parametrize("prior", [bnnify.Gaussian(std=0.1), bnnify.Laplace(), bnnify.ScaleMixture()], ids=str)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_layer_may_be_used_in_two_regions_and_in_the_kl(use_reentrant, prior):
    def gradients(use_reentrant):
        bnn = bnnify.convert(SharedInRegions(use_reentrant), prior=prior)
        losses = []
        for seed in range(2):
            torch.manual_seed(seed)
            output, kl = bnn(X)
            losses.append((seed + 1) * output.square().sum() + kl)
        sum(losses).backward()
        return [parameter.grad for parameter in bnn.parameters()]

    for found, expected in zip(gradients(use_reentrant), gradients(None), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_the_whole_bayesian_model_may_stand_inside_a_checkpoint(use_reentrant):
    def gradient(checkpointed: bool) -> torch.Tensor:
        bnn = mlp()
        torch.manual_seed(1)
        x = X.clone().requires_grad_()
        output = checkpoint(lambda x: bnn(x)[0], x, use_reentrant=use_reentrant) if checkpointed else bnn(x)[0]
        output.sum().backward()
        return bnn.module[0].weight_rho.grad

    torch.testing.assert_close(gradient(True), gradient(False))


def mean_gradient(model: nn.Module) -> torch.Tensor:
    model.zero_grad()
    torch.manual_seed(0)
    model(X).sum().backward()
    return model.first.weight.grad.clone() if hasattr(model, "first") else model[0].weight.grad.clone()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_backward_leaves_nothing_in_effect_even_when_it_fails(use_reentrant):
    bnn = bnnify.convert(Recomputed(use_reentrant))
    expected = mean_gradient(bnn.module)
    bnn(X)[0].sum().backward()
    assert torch.equal(mean_gradient(bnn.module), expected)

    output, _ = bnn(X)

    def fail(grad: torch.Tensor) -> None:
        raise RuntimeError("on purpose")

    handle = bnn.module.first.weight_rho.register_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        output.sum().backward()
    handle.remove()
    assert torch.equal(mean_gradient(bnn.module), expected)


def test_the_samples_are_freed_with_the_output():
    bnn = bnnify.convert(Recomputed(False))
    output, kl = bnn(X)
    hook = next(iter(output._backward_hooks.values()))
    samples = [weakref.ref(entry[1]) for _, entry in hook.__self__._entries]
    (output.sum() + kl).backward()
    del output, kl, hook
    gc.collect()
    assert [sample() for sample in samples] == [None] * len(samples)


def test_backward_may_run_in_another_thread():
    expected = gradients(bnnify.convert(Recomputed(None)), "forward")
    bnn, found = bnnify.convert(Recomputed(False)), []
    thread = threading.Thread(target=lambda: found.extend(gradients(bnn, "forward")))
    thread.start()
    thread.join()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_draw_of_another_thread_is_not_replayed():
    def gradient(use_reentrant: bool | None) -> torch.Tensor:
        bnn = bnnify.convert(Recomputed(use_reentrant))
        entered, done = threading.Event(), threading.Event()

        def draw_meanwhile() -> None:
            with bnn.draw():
                entered.set()
                done.wait(timeout=30)

        torch.manual_seed(1)
        with bnn.draw():
            other = threading.Thread(target=draw_meanwhile)
            other.start()
            entered.wait(timeout=30)
            torch.manual_seed(2)
            bnn.module(X).sum().backward()
            done.set()
            other.join()
        return bnn.module.first.weight_rho.grad

    torch.testing.assert_close(gradient(False), gradient(None))


def test_a_copy_made_inside_a_draw_hooks_nothing():
    bnn = bnnify.convert(Recomputed(False))
    with bnn.draw():
        other = copy.deepcopy(bnn)
    output = other.module(X)
    assert not output._backward_hooks
