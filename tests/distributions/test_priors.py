"""Priors and their KL: closed forms against torch.distributions, precision, memory, and the pull on the weights."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bnnify
from bnnify import Gaussian, Moped, Pretrained, Relative
from bnnify.distributions.gaussian import std
from bnnify.distributions.prior import Posterior

PRIORS = (
    Gaussian(),
    Gaussian(std=0.1),
    Gaussian(mean=-0.5, std=3.0),
    Pretrained(),
    Pretrained(std=0.3),
    Pretrained(scale=2.0),
)
STDS = (0.03, Relative(0.2), Moped(0.1))


def network(dtype=torch.float64):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5)).to(dtype)


def trained_a_little(bnn, amount=0.1):
    """Away from where the conversion left it, so that no term of the KL is zero."""
    with torch.no_grad():
        for parameter in bnn.parameters():
            if parameter.requires_grad:
                parameter.add_(amount * torch.randn_like(parameter))
    return bnn


def initial_rms(weight, posterior_std):
    """The rms of the σ that a rule gives a weight, from the rule's formula."""
    if isinstance(posterior_std, float):
        return posterior_std
    fraction = posterior_std.fraction if isinstance(posterior_std, Relative) else posterior_std.delta
    return fraction * weight.double().square().mean().sqrt().item()


def reference_kl(model, prior, posterior_std, bnn):
    """The KL of a trained ``bnn`` that was converted from ``model``, from names and formulas alone."""
    tensors = {name: tensor.detach().double() for name, tensor in bnn.module.named_parameters()}
    fresh = dict(bnnify.convert(model, prior=prior, posterior_std=posterior_std).module.named_parameters())
    total = torch.zeros((), dtype=torch.float64)
    for name, weight in model.named_parameters():
        # What the dtype could hold of the σ that the rule asked for.
        start = torch.log1p(fresh[f"{name}_rho"].detach().double().exp())
        torch.testing.assert_close(
            start.square().mean().sqrt().item(), initial_rms(weight.detach(), posterior_std), rtol=0.05, atol=0
        )
        prior_std = prior.std if prior.std is not None else prior.scale * start.square().mean().sqrt().item()
        prior_mean = weight.detach().double() if isinstance(prior, Pretrained) else float64(prior.mean)
        posterior = Normal(tensors[name], torch.log1p(tensors[f"{name}_rho"].exp()))
        total += kl_divergence(posterior, Normal(prior_mean, float64(prior_std))).sum()
    return total


def float64(value):
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.bfloat16, 1e-5)],
)
@pytest.mark.parametrize("prior", PRIORS, ids=str)
def test_kl_is_the_sum_of_torch_distributions_kl(prior, dtype, tolerance):
    model = network(dtype)
    for posterior_std in STDS:
        bnn = trained_a_little(bnnify.convert(model, prior=prior, posterior_std=posterior_std))
        kl = bnn.kl()
        assert kl.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert kl.shape == ()
        expected = reference_kl(model, prior, posterior_std, bnn)
        torch.testing.assert_close(kl.detach().double(), expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kl_of_millions_of_weights_loses_nothing_to_half_precision(dtype):
    mean, rho = torch.randn(2000, 1000, dtype=dtype), torch.full((2000, 1000), -3.0, dtype=dtype)
    kl = Gaussian(std=0.5).kl(Posterior(mean, rho, None, math.nan)).sum()
    exact = kl_divergence(Normal(mean.double(), std(rho.double())), Normal(0.0, torch.tensor(0.5).double())).sum()
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kl_and_its_gradient_are_finite_for_extreme_rho(dtype):
    mean = torch.zeros(5, dtype=dtype, requires_grad=True)
    rho = torch.tensor([-200.0, -110.0, -30.0, 50.0, 200.0], dtype=dtype, requires_grad=True)
    kl = Gaussian(std=0.5).kl(Posterior(mean, rho, None, math.nan)).sum()
    kl.backward()
    assert kl.isfinite()
    assert rho.grad.isfinite().all()
    # A σ far too small grows, one far too large shrinks.
    assert (rho.grad.sign() == rho.detach().sign()).all()


def test_kl_does_not_depend_on_the_draw_and_costs_no_randomness():
    bnn = trained_a_little(bnnify.convert(network()))
    state = torch.get_rng_state()
    kl = bnn.kl()
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    with bnn.draw():
        inside = bnn.kl()
        again = bnn(x)[1]
    assert kl == inside == again == bnn(x)[1]


class Allocations(TorchDispatchMode):
    """Which operations make a full-size tensor out of nothing, and how many results of that size there are."""

    FACTORIES = ("full", "ones", "zeros", "empty", "new_full", "new_ones", "new_zeros", "new_empty", "full_like")
    FACTORIES += ("ones_like", "zeros_like", "empty_like", "fill", "scalar_tensor", "arange")

    def __init__(self, numel):
        super().__init__()
        self.numel = numel
        self.factories = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in self.FACTORIES or name in ("expand", "repeat"):
            sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            self.factories += [name for size in sizes if size >= self.numel and name != "expand"]
        return result


def test_the_watcher_sees_a_materialised_constant():
    with Allocations(15) as watched:
        torch.zeros(3, 5)
        torch.full_like(torch.empty(3, 5), 2.0)
        torch.ones(3)
    assert watched.factories == ["zeros", "empty", "full_like"]


@pytest.mark.parametrize("mean", [0.0, 0.1])
def test_scalar_priors_are_never_materialised(mean):
    bnn = trained_a_little(bnnify.convert(nn.Linear(40, 30, bias=False), prior=Gaussian(mean=mean, std=0.3)))
    assert set(bnn.module.state_dict()) == {"weight", "weight_rho"}
    with Allocations(1200) as watched:
        kl = bnn.kl()
    assert watched.factories == []
    assert kl.isfinite()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        bnn.kl()
    assert not any(
        tensor.numel() == 1200 and tensor.is_floating_point() and (tensor == tensor.flatten()[0]).all()
        for tensor in kept
    )


# The pretrained prior


@pytest.mark.parametrize("inplace", [False, True])
def test_pretrained_values_are_kept_apart_from_the_mean(inplace):
    model = network()
    original = copy.deepcopy(model.state_dict())
    bnn = bnnify.convert(model, inplace=inplace)
    storages = [tensor.untyped_storage().data_ptr() for tensor in bnn.module.state_dict().values()]
    assert len(set(storages)) == len(storages)
    trained_a_little(bnn)
    for name, value in original.items():
        assert torch.equal(bnn.module.state_dict()[f"{name}_prior_mean"], value)
        assert not torch.equal(bnn.module.state_dict()[name], value)


@pytest.mark.parametrize("prior", [Pretrained(), Gaussian()], ids=str)
def test_only_a_centred_prior_keeps_pretrained_values_and_these_are_frozen(prior):
    bnn = bnnify.convert(network(), prior=prior)
    kept = {name: tensor for name, tensor in bnn.module.named_parameters() if name.endswith("_prior_mean")}
    assert len(kept) == (4 if prior.centred else 0)
    assert not any(tensor.requires_grad for tensor in kept.values())
    bnn.kl().backward()
    assert all(tensor.grad is None for tensor in kept.values())


@pytest.mark.parametrize(
    ("dtype", "per_weight"),
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.float16, 1e-5), (torch.bfloat16, 1e-3)],
)
def test_kl_of_a_fresh_conversion_is_zero(dtype, per_weight):
    for posterior_std in (0.03, Relative(0.2), Relative(2.0)):
        bnn = bnnify.convert(network(dtype), prior=Pretrained(), posterior_std=posterior_std)
        count = sum(entry.numel for entry in bnn.report.bayesian)
        assert abs(bnn.kl().item()) <= per_weight * count, posterior_std


def test_default_prior_std_stays_what_it_was_while_the_posterior_moves():
    bnn = bnnify.convert(nn.Linear(5, 5), posterior_std=0.1)
    with torch.no_grad():
        bnn.module.weight_rho.fill_(math.log(math.expm1(0.3)))
    per_weight = kl_divergence(Normal(0.0, 0.3), Normal(0.0, 0.1))
    torch.testing.assert_close(bnn.kl().detach(), 25 * per_weight, rtol=1e-5, atol=0)


# A prior of one's own


class UnitLaplace(bnnify.Prior):
    """p(w) = Laplace(0, 1), whose KL from N(0, σ²) at μ = 0 has the closed form E|w| + log 2 - H[q]."""

    def kl(self, posterior):
        sigma = std(posterior.rho)
        q = Normal(posterior.mean, sigma)
        mean_absolute = sigma * math.sqrt(2 / math.pi) * (-(posterior.mean**2) / (2 * sigma**2)).exp()
        mean_absolute = mean_absolute + posterior.mean * torch.erf(posterior.mean / (sigma * math.sqrt(2)))
        return mean_absolute + math.log(2) - q.entropy()


class TowardsPretrained(bnnify.Prior):
    centred = True

    def kl(self, posterior):
        return (posterior.mean - posterior.prior_mean).square()


def test_a_prior_of_ones_own_needs_one_method():
    bnn = trained_a_little(bnnify.convert(nn.Linear(3, 2, dtype=torch.float64), prior=UnitLaplace(), posterior_std=0.5))
    output, kl = bnn(torch.randn(4, 3, dtype=torch.float64))
    grid = torch.linspace(-12, 12, 200001, dtype=torch.float64)
    integral = torch.zeros((), dtype=torch.float64)
    for name in ("weight", "bias"):
        mean, sigma = getattr(bnn.module, name).detach(), std(getattr(bnn.module, f"{name}_rho").detach())
        for m, s in zip(mean.flatten(), sigma.flatten(), strict=True):
            log_q = Normal(m, s).log_prob(grid)
            integral += torch.trapezoid(log_q.exp() * (log_q + grid.abs() + math.log(2)), grid)
    torch.testing.assert_close(kl.detach(), integral, rtol=1e-6, atol=0)
    (output.sum() + kl).backward()
    assert bnn.module.weight_rho.grad is not None
    assert "UnitLaplace" in str(bnn.report)


def test_a_centred_prior_of_ones_own_is_given_the_pretrained_values():
    bnn = bnnify.convert(nn.Linear(3, 2), prior={"weight": TowardsPretrained(), "bias": Gaussian()})
    assert "weight_prior_mean" in bnn.module.state_dict()
    assert "bias_prior_mean" not in bnn.module.state_dict()
    with torch.no_grad():
        bnn.module.weight += 1
    layer = bnn.module
    bias_kl = kl_divergence(Normal(layer.bias, std(layer.bias_rho)), Normal(0.0, 1.0)).sum()
    torch.testing.assert_close(bnn.kl(), 6 + bias_kl)


def test_a_prior_that_sums_by_itself_is_told_not_to():
    class Summed(Gaussian):
        def kl(self, posterior):
            return super().kl(posterior).sum()

    bnn = bnnify.convert(nn.Linear(3, 2), prior={"weight": Summed(), "bias": Gaussian()})
    with pytest.raises(bnnify.ConversionError, match=r"weight`, of shape \(2, 3\), not one KL .* of shape \(\)"):
        bnn.kl()


class NotCentred(Pretrained):
    centred = False


class WithoutInitialStd(Pretrained):
    needs_initial_std = False


class OfRho(bnnify.Prior):
    def kl(self, posterior):
        return posterior.wide_rho

    penalty = kl


@pytest.mark.parametrize(
    ("prior", "posterior", "match"),
    [
        (NotCentred(), bnnify.MeanField(), "`prior_mean`.*centred = True"),
        (WithoutInitialStd(), bnnify.MeanField(), "`initial_std`.*needs_initial_std"),
        (OfRho(), bnnify.Point(), "`rho`.*log_prob"),
    ],
)
def test_a_prior_that_looks_at_what_it_did_not_ask_for_is_told_how_to_ask(prior, posterior, match):
    with pytest.raises(bnnify.ConversionError, match=match):
        bnnify.convert(nn.Linear(3, 2).double(), prior=prior, posterior=posterior).kl()


def test_a_prior_without_a_kl_cannot_be_made():
    class Unfinished(bnnify.Prior):
        pass

    with pytest.raises(TypeError, match="kl"):
        Unfinished()


# Bad arguments


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda value: Gaussian(std=value), "Gaussian(std)"),
        (lambda value: Pretrained(std=value), "Pretrained(std)"),
        (lambda value: Pretrained(scale=value), "Pretrained(scale)"),
    ],
    ids=["Gaussian(std)", "Pretrained(std)", "Pretrained(scale)"],
)
def test_scales_must_be_positive_numbers(make, argument):
    for value in (0, 0.0, -1.0, math.nan, math.inf, "1", True):
        with pytest.raises(bnnify.ConversionError) as error:
            make(value)
        assert str(error.value) == f"{argument} must be a positive, finite number, not {value!r}."


@pytest.mark.parametrize("value", [math.nan, math.inf, "0", None])
def test_the_mean_must_be_a_finite_number(value):
    with pytest.raises(bnnify.ConversionError, match=rf"Gaussian\(mean\) must be finite, not {value!r}"):
        Gaussian(mean=value)


@pytest.mark.parametrize("prior", ["gaussian", None, Gaussian, Normal(0.0, 1.0), 1.0], ids=str)
def test_what_is_not_a_prior_is_refused(prior):
    with pytest.raises(bnnify.ConversionError, match=r"Unknown prior .*Gaussian\(std=0.1\) or Pretrained\(\)"):
        bnnify.convert(nn.Linear(2, 2), prior=prior)
