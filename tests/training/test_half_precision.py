"""Models in half precision: ρ is in float32, where a step of an optimizer is not lost, and so is the KL."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnnify
from bnnify.modules.parameters import bayesian_parameters

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def rhos(bnn):
    return {parameter.name: parameter.rho.detach().clone() for parameter in bayesian_parameters(bnn.module)}


def away_from_the_prior(bnn):
    """Move means and ρ as training does."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in bayesian_parameters(bnn.module):
            parameter.mean.add_(0.1 * torch.randn_like(parameter.mean))
            parameter.rho.add_(0.5 + 0.3 * torch.randn_like(parameter.rho))
    return bnn


@pytest.mark.parametrize("fused", [False, True])
def test_sigma_moves_with_every_step_of_adam_in_bfloat16(fused):
    """By about the learning rate: near ρ = -5 the numbers of bfloat16 are 1/32 apart."""
    bnn = bnnify.convert(network(torch.bfloat16))
    before = rhos(bnn)
    optimizer = torch.optim.Adam(bnn.parameter_groups(lr=1e-3), fused=fused)
    x, y = torch.randn(32, 8, dtype=torch.bfloat16), torch.randint(3, (32,))
    for _ in range(20):
        optimizer.zero_grad()
        output, kl = bnn(x)
        bnnify.elbo(F.cross_entropy(output.float(), y), kl, num_data=32).backward()
        optimizer.step()
    for name, rho in rhos(bnn).items():
        moved = (rho - before[name]).abs()
        assert moved.min() > 0, name
        assert 0.01 < moved.median() < 0.03, name


@HALVES
def test_the_kl_and_its_gradient_are_those_of_float32(dtype):
    half = bnnify.convert(network(dtype))
    wide = bnnify.convert(copy.deepcopy(network(dtype)).float())
    away_from_the_prior(half)
    wide.load_state_dict(half.state_dict())
    assert half.kl().dtype == torch.float32
    torch.testing.assert_close(half.kl(), wide.kl(), rtol=1e-3, atol=0.0)
    half.kl().backward()
    wide.kl().backward()
    for parameter, other in zip(bayesian_parameters(half.module), bayesian_parameters(wide.module), strict=True):
        torch.testing.assert_close(parameter.rho.grad, other.rho.grad, rtol=1e-3, atol=1e-4)


@HALVES
def test_only_rho_is_wider_than_the_weights_and_samples_have_their_dtype(dtype):
    bnn = bnnify.convert(network(dtype))
    assert {p.dtype for n, p in bnn.named_parameters() if n.endswith("_rho")} == {torch.float32}
    assert {p.dtype for n, p in bnn.named_parameters() if not n.endswith("_rho")} == {dtype}
    with bnn.draw():
        assert bnn.module[0].weight.dtype == dtype
    sampled = bnn(torch.ones(2, 8, dtype=dtype))[0]
    assert sampled.dtype == dtype


@HALVES
def test_a_cast_of_the_model_leaves_sigma_as_it_was(dtype):
    bnn = away_from_the_prior(bnnify.convert(network()))
    bnn.kl().backward()
    before, grad = rhos(bnn), bnn.module[0].weight_rho.grad.clone()
    optimizer = torch.optim.SGD(bnn.parameters(), lr=0.0)
    bnn.to(dtype)
    assert {p.dtype for n, p in bnn.named_parameters() if not n.endswith("_rho")} == {dtype}
    assert all(torch.equal(rho, before[name]) for name, rho in rhos(bnn).items())
    assert torch.equal(bnn.module[0].weight_rho.grad, grad)
    optimizer.step()
    assert {p.dtype for p in copy.deepcopy(bnn).double().parameters()} == {torch.float64}
    assert all(torch.equal(rho, before[name]) for name, rho in rhos(bnn.float()).items())


def in_half(state):
    """What a model in bfloat16 gave before its ρ was in float32."""
    return {n: v.bfloat16() if n.endswith("_rho") else v for n, v in state.items()}


@pytest.mark.parametrize("how", ["load", "load_state_dict", "assign", "meta"])
def test_rho_in_half_precision_of_an_earlier_version_is_read_and_widened(how, tmp_path):
    written = away_from_the_prior(bnnify.convert(network(torch.bfloat16)))
    state = in_half(written.module.state_dict())
    bnn = bnnify.convert(network(torch.bfloat16))
    if how == "load":
        bnnify.save(written, tmp_path / "x.bnn.pt")
        content = torch.load(tmp_path / "x.bnn.pt")
        content["bnnify"]["format"] = 4
        torch.save(content | {"state_dict": state}, tmp_path / "x.bnn.pt")
        bnn = bnnify.load(tmp_path / "x.bnn.pt", network(torch.bfloat16))
    elif how == "meta":
        with torch.device("meta"):
            bnn = bnnify.convert(network(torch.bfloat16))
        bnnify.load_weights(bnn, state)
    else:
        bnn.module.load_state_dict(state, assign=how == "assign")
    for name, rho in rhos(bnn).items():
        assert rho.dtype == torch.float32
        assert torch.equal(rho, state[name + "_rho"].float())
