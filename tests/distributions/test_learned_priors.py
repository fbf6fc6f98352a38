"""Priors with a learned scale: the scale that maximises the ELBO, at every step of the training."""

import math

import pytest
import torch
from torch import nn

import bnnify
from bnnify import Gaussian, Laplace, Pretrained
from bnnify.modules.parameters import unique_bayesian_parameters

LEARNED = [
    (Gaussian(mean=0.2, std="learned"), lambda scale: Gaussian(mean=0.2, std=scale)),
    (Pretrained(std="learned"), lambda scale: Pretrained(std=scale)),
    (Laplace(mean=0.2, scale="learned"), lambda scale: Laplace(mean=0.2, scale=scale)),
]
learned = pytest.mark.parametrize(("prior", "fixed"), LEARNED, ids=["gaussian", "pretrained", "laplace"])


def converted(prior, shape=(5, 4), dtype=torch.float64):
    """A layer without bias, away from where the conversion left it."""
    bnn = bnnify.convert(nn.Linear(shape[1], shape[0], bias=False, dtype=dtype), prior=prior, posterior_std=0.05)
    with torch.no_grad():
        bnn.module.weight.add_(0.3 * torch.randn_like(bnn.module.weight))
        bnn.module.weight_rho.add_(torch.randn_like(bnn.module.weight))
    return bnn


def kl_under(bnn, prior):
    bnn.module._bayesian["weight"].prior = prior
    return bnn.kl()


@learned
def test_the_kl_is_the_smallest_that_any_scale_gives_and_its_gradient_is_that_under_this_scale(prior, fixed):
    bnn = converted(prior)
    kl = bnn.kl()
    gradients = torch.autograd.grad(kl, [bnn.module.weight, bnn.module.weight_rho])
    scales = [0.25 * 1.01**step for step in range(-200, 300)]
    with torch.no_grad():
        best = min(scales, key=lambda scale: kl_under(bnn, fixed(scale)).item())
    under_best = kl_under(bnn, fixed(best))
    assert kl.item() <= under_best.item()
    assert kl.item() == pytest.approx(under_best.item(), abs=1e-3)
    # The scale sits at its optimum, so that its own change adds nothing to the gradient.
    for found, wanted in zip(
        gradients, torch.autograd.grad(under_best, [bnn.module.weight, bnn.module.weight_rho]), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)


def test_each_tensor_has_a_scale_of_its_own():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight.data.mul_(1000)
    bnn = bnnify.convert(model, prior=Gaussian(std="learned"))
    # In units of its own scale each is the same, so that the KL does not see the factor.
    alone = bnnify.convert(model[0], prior=Gaussian(std="learned"))
    scaled = next(p for p in unique_bayesian_parameters(bnn.module) if p.name == "1.weight")
    whole, first = bnn.kl().detach(), alone.kl().detach()
    assert math.isfinite(whole)
    torch.testing.assert_close(whole - first, scaled.kl().detach(), rtol=1e-4, atol=1e-3)
    model[1].weight.data.div_(1000)
    torch.testing.assert_close(
        bnnify.convert(model, prior=Gaussian(std="learned")).kl().detach(), whole, rtol=1e-3, atol=1e-2
    )


@learned
def test_data_that_need_large_weights_widen_the_prior(prior, fixed):
    """Regression on y = 5x: with a prior fixed too narrow the fit is poor; a learned one finds the width."""
    x = torch.randn(40, 4)
    y = 5 * x.sum(1, keepdim=True)
    fits = {}
    for name, each in (("learned", prior), ("narrow", fixed(0.1))):
        bnn = bnnify.convert(nn.Linear(4, 1, bias=False), prior=each, posterior_std=0.05)
        optimizer = torch.optim.Adam(bnn.parameters(), lr=0.05)
        for _ in range(400):
            output, kl = bnn(x)
            optimizer.zero_grad()
            bnnify.elbo(0.5 * (output - y).square().mean(), kl, num_data=40).backward()
            optimizer.step()
        fits[name] = (bnn.module(x) - y).square().mean().item()
    assert fits["learned"] < 0.2 * fits["narrow"]


@learned
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_half_precision_and_a_posterior_at_the_prior_mean_are_no_trouble(prior, fixed, dtype):
    bnn = converted(prior, dtype=dtype)
    assert bnn.kl().isfinite()
    with torch.no_grad():
        bnn.module.weight.copy_(getattr(bnn.module, "weight_prior_mean", torch.full((), 0.2)))
        bnn.module.weight_rho.fill_(-200.0)
    kl = bnn.kl()
    kl.backward()
    assert kl.isfinite()
    assert bnn.module.weight.grad.isfinite().all()
    assert bnn.module.weight_rho.grad.isfinite().all()


@learned
def test_a_file_restores_it(prior, fixed, tmp_path):
    bnn = bnnify.convert(nn.Linear(3, 2), prior=prior)
    bnnify.save(bnn, tmp_path / "model.pt")
    restored = bnnify.load(tmp_path / "model.pt", nn.Linear(3, 2))
    assert torch.equal(restored.kl(), bnn.kl())
    assert "learned" in str(restored.report)


@pytest.mark.parametrize("make", [lambda: Gaussian(std="fitted"), lambda: Laplace(scale="fitted")])
def test_another_word_is_refused(make):
    with pytest.raises(bnnify.ConversionError, match="must be a positive, finite number, not 'fitted'"):
        make()
