"""Draws: one network each, which nest, and the values that somebody puts in the place of a parameter."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

import bnnify
from bnnify.modules.parameters import bayesian_parameters, unique_bayesian_parameters
from tests import zoo


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


class GraphBreak(nn.Module):
    """A model that the compiler cannot take as one graph."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x):
        x = self.first(x)
        torch._dynamo.graph_break()
        return x + self.last(x) if x.sum().item() < 1e6 else x


@pytest.mark.parametrize("estimator", ["reparameterization", "local", "flipout"])
def test_where_the_compiler_gives_up_the_draw_is_still_in_effect(estimator):
    bnn = bnnify.convert(GraphBreak(), estimator=estimator, posterior_std=0.5)
    compiled, x = torch.compile(bnn, backend="eager"), torch.ones(2, 5)
    (output, kl), (other, _) = compiled(x), compiled(x)
    torch.testing.assert_close(kl, bnn.kl())
    assert not torch.allclose(output, other)
    assert not torch.allclose(output, bnn.module(x))
    output.sum().backward()
    assert all((parameter.rho.grad != 0).any() for parameter in bayesian_parameters(bnn.module))
    with bnn.draw():
        inside = torch.compile(bnn.module, backend="eager")(x)
        assert torch.equal(inside, bnn.module(x))
    assert not torch.allclose(inside, bnn.module(x))

    @torch.compile(backend="eager")
    def draws_itself(x):
        with bnn.draw():
            return bnn.module(x)

    assert not torch.allclose(draws_itself(x), bnn.module(x))
    assert not torch.allclose(draws_itself(x), draws_itself(x))


def test_a_draw_that_was_not_entered_cannot_be_left():
    with pytest.raises(bnnify.DrawError, match="not entered"):
        bnnify.convert(nn.Linear(3, 2)).draw().__exit__()
