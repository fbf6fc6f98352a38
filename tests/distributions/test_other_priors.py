"""Laplace and scale mixture: the KL against quadrature, its gradient, extremes, and which sample it is taken from."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, Normal, kl_divergence

import bnnify
from bnnify import Gaussian, Laplace, ScaleMixture
from bnnify.distributions.gaussian import std
from bnnify.distributions.prior import KLTerms, Posterior
from bnnify.draws.sample import sample

POSTERIORS = [(0.0, 0.3), (0.7, 0.05), (-1.5, 1.0), (0.02, 1e-4), (3.0, 2.0)]


def double(value):
    return torch.tensor(value, dtype=torch.float64)


def log_density(prior, weights):
    """log p(w) by torch.distributions."""
    if isinstance(prior, Laplace):
        return torch.distributions.Laplace(double(prior.mean), double(prior.scale)).log_prob(weights)
    components = Normal(double([0.0, 0.0]), double([prior.std1, prior.std2]))
    return MixtureSameFamily(Categorical(double([prior.pi, 1 - prior.pi])), components).log_prob(weights)


def by_quadrature(prior, mean, sigma):
    """∫ q (log q - log p), over a grid that is fine enough for the narrowest part of either."""
    # An even number of points, so that none of them lies on the kink of a Laplace prior.
    grid = torch.linspace(-12, 12, 400_000, dtype=torch.float64) * sigma + mean
    log_q = Normal(mean, sigma).log_prob(grid)
    return torch.trapezoid(log_q.exp() * (log_q - log_density(prior, grid)), grid)


def linear(mean, sigma, prior, shape=(1, 1), dtype=torch.float64):
    """A converted layer without bias, all of whose weights have this posterior."""
    layer = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
    nn.init.constant_(layer.weight, mean)
    return bnnify.convert(layer, prior=prior, posterior_std=sigma)


@pytest.mark.parametrize("prior", [Laplace(mean=0.5, scale=0.1), Laplace(scale=20.0)], ids=str)
@pytest.mark.parametrize(("mean", "sigma"), POSTERIORS)
def test_the_laplace_kl_is_the_integral_and_so_is_its_gradient(prior, mean, sigma):
    bnn = linear(mean, sigma, prior)
    kl = bnn.kl()
    mu, s = double(mean).requires_grad_(), double(sigma).requires_grad_()
    expected = by_quadrature(prior, mu, s)
    torch.testing.assert_close(kl, expected, rtol=1e-5, atol=1e-7)

    kl.backward()
    wanted_mu, wanted_sigma = torch.autograd.grad(expected, [mu, s])
    layer = bnn.module
    torch.testing.assert_close(layer.weight.grad.squeeze(), wanted_mu, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        layer.weight_rho.grad.squeeze(),
        wanted_sigma * layer.weight_rho.detach().sigmoid().squeeze(),
        rtol=1e-3,  # the grid's own error at the kink
        atol=1e-4,
    )


def slopes(prior, mean, rho):
    """∂KL/∂μ and ∂KL/∂ρ in the precision of Python, for a closed form."""
    sigma = math.log1p(math.exp(rho)) if rho < 700 else rho
    slope = 1 / (1 + math.exp(-rho)) if rho > -700 else 0.0
    log_slope = slope / sigma if sigma else 1.0  # of log σ
    if isinstance(prior, Gaussian):
        return (mean - prior.mean) / prior.std**2, sigma * slope / prior.std**2 - log_slope
    ratio = min(max((mean - prior.mean) / max(sigma, 1e-300), -40.0), 40.0)
    density = math.sqrt(2 / math.pi) * math.exp(-0.5 * ratio**2)
    return math.erf(ratio / math.sqrt(2)) / prior.scale, density * slope / prior.scale - log_slope


EXTREME_RHOS = (-1e4, -300.0, -110.0, -88.0, -86.0, -61.0, -59.0, -45.0, -43.0, -20.0, 0.0, 30.0, 100.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prior", [Laplace(mean=0.5, scale=0.125), Gaussian(mean=0.5, std=0.125)], ids=str)
def test_the_gradient_of_a_closed_form_is_right_for_every_rho(prior, dtype):
    for mean in (0.0, 1e-10, 0.5, -30.0):
        layer = nn.Linear(len(EXTREME_RHOS), 1, bias=False, dtype=dtype)
        nn.init.constant_(layer.weight, mean)
        bnn = bnnify.convert(layer, prior=prior)
        bnn.module.weight_rho.data.copy_(torch.tensor([EXTREME_RHOS]))
        bnn.kl().backward()
        layer = bnn.module
        pairs = zip(layer._parameters["weight"].flatten().tolist(), layer.weight_rho.flatten().tolist(), strict=True)
        expected = torch.tensor([slopes(prior, *pair) for pair in pairs], dtype=torch.float64).T
        found = torch.cat([layer._parameters["weight"].grad, layer.weight_rho.grad]).double()
        tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 8e-3)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "prior",
    [ScaleMixture(pi=0.5, std1=1.0, std2=math.exp(-8)), Gaussian(std="learned"), Laplace(scale="learned")],
    ids=str,
)
def test_other_kls_and_their_gradients_are_finite_at_the_extremes(prior, dtype):
    for mean in (0.0, 1e-3, 30.0):
        mean = torch.full((len(EXTREME_RHOS),), mean, dtype=dtype, requires_grad=True)
        rho = torch.tensor(EXTREME_RHOS, dtype=dtype, requires_grad=True)
        kl = prior.kl(Posterior(mean, rho, None, math.nan, sample(mean, rho)))
        kl.sum().backward()
        assert kl.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert all(tensor.isfinite().all() for tensor in (kl, mean.grad, rho.grad))


def test_the_laplace_kl_has_second_derivatives():
    mean, rho = double([0.3, -1.0, 0.0]).requires_grad_(), double([-1.0, 0.5, -3.0]).requires_grad_()
    kl = lambda mean, rho: Laplace(mean=0.1, scale=0.5).kl(Posterior(mean, rho, None, math.nan))  # noqa: E731
    assert torch.autograd.gradcheck(kl, (mean, rho))
    assert torch.autograd.gradgradcheck(kl, (mean, rho))


@pytest.mark.parametrize("prior", [ScaleMixture(pi=0.25, std1=0.5, std2=math.exp(-8))], ids=str)
@pytest.mark.parametrize(("mean", "sigma"), POSTERIORS)
def test_the_scale_mixtures_kl_is_the_integral_on_average_and_so_is_its_gradient(prior, mean, sigma):
    count = 200_000  # equal weights, so that their sum holds as many independent estimates
    bnn = linear(mean, sigma, prior, shape=(1, count))
    mu, s = double(mean).requires_grad_(), double(sigma).requires_grad_()
    expected = by_quadrature(prior, mu, s)
    with bnn.draw():
        weights = bnn.module.weight.detach()
        bnn.kl().backward()
        kl = bnn.kl().item() / count
    terms = -Normal(mean, sigma).entropy() - log_density(prior, weights)
    assert kl == pytest.approx(terms.mean().item(), rel=1e-6)
    assert abs(kl - expected.item()) < 5 * terms.std().item() / math.sqrt(count)

    wanted = torch.stack(torch.autograd.grad(expected, [mu, s]))
    layer = bnn.module
    by_sigma = layer.weight_rho.grad / layer.weight_rho.detach().sigmoid()
    for gradients, exact in zip((layer.weight.grad, by_sigma), wanted, strict=True):
        assert abs(gradients.mean() - exact) < 5 * gradients.std() / math.sqrt(count) + 1e-9


def test_the_density_of_the_scale_mixture_is_stable_where_the_narrow_component_underflows():
    prior = ScaleMixture(pi=0.5, std1=1.0, std2=math.exp(-8))
    weights = torch.tensor([0.0, 1e-6, 1e-3, 0.1, 5.0, 1e4], requires_grad=True)
    found = prior.log_prob(weights)
    exact = log_density(prior, weights.detach().double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    found.sum().backward()
    assert weights.grad.isfinite().all()
    assert prior.log_prob(torch.tensor([1e19])).isfinite().all()


def test_the_kl_is_taken_from_the_sample_that_the_forward_used():
    bnn = linear(0.3, 0.2, ScaleMixture(), shape=(1, 1))
    x = torch.ones(1, 1, dtype=torch.float64)
    output, kl = bnn(x)
    expected = -Normal(0.3, 0.2).entropy() - log_density(ScaleMixture(), output.detach())
    torch.testing.assert_close(kl.detach(), expected.sum())
    assert bnn(x)[1] != bnn(x)[1]
    with bnn.draw():
        assert bnn(x)[1] == bnn(x)[1] == bnn.kl()


def test_its_gradient_flows_through_that_sample_to_means_and_rhos():
    bnn = linear(0.3, 0.2, ScaleMixture(pi=0.5, std1=1.0, std2=0.1))
    layer = bnn.module
    with bnn.draw():
        epsilon = ((layer.weight - 0.3) / 0.2).detach()
        bnn.kl().backward()
    mean, rho = layer.weight.detach().clone().requires_grad_(), layer.weight_rho.detach().clone().requires_grad_()
    expected = -Normal(mean, std(rho)).entropy() - log_density(
        ScaleMixture(pi=0.5, std1=1.0, std2=0.1), mean + std(rho) * epsilon
    )
    expected.sum().backward()
    torch.testing.assert_close(layer.weight.grad, mean.grad)
    torch.testing.assert_close(layer.weight_rho.grad, rho.grad)


class StudentT(bnnify.MonteCarloPrior):
    def log_prob(self, weights):
        return torch.distributions.StudentT(3.0).log_prob(weights)


class SaysNothingOfSamples(StudentT):
    needs_sample = False


@pytest.mark.parametrize("prior", [StudentT(), SaysNothingOfSamples()], ids=lambda prior: type(prior).__name__)
def test_a_prior_of_ones_own_known_by_its_density_needs_one_method(prior):
    bnn = linear(0.4, 0.5, prior, shape=(1, 100_000))
    grid = torch.linspace(-10, 10, 100_001, dtype=torch.float64)
    log_q = Normal(0.4, 0.5).log_prob(grid)
    expected = torch.trapezoid(log_q.exp() * (log_q - torch.distributions.StudentT(3.0).log_prob(grid)), grid)
    assert bnn.kl().item() / 100_000 == pytest.approx(expected.item(), rel=0.02)


def test_the_report_says_which_kl_is_an_estimate():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    report = bnnify.convert(model, prior={"0": ScaleMixture(), "1": Laplace()}).report
    assert ["Monte Carlo" in entry.settings for entry in report.bayesian] == [True, True, False, False]


@pytest.mark.parametrize("prior", [Laplace(mean=0.1, scale=0.3), ScaleMixture(pi=0.25, std1=2.0, std2=0.01)], ids=str)
def test_a_file_restores_the_prior(prior, tmp_path):
    bnn = bnnify.convert(nn.Linear(3, 2), prior=prior)
    bnnify.save(bnn, tmp_path / "model.pt")
    restored = bnnify.load(tmp_path / "model.pt", nn.Linear(3, 2))
    assert str(restored.report) == str(bnn.report)
    torch.manual_seed(1)
    expected = bnn.kl()
    torch.manual_seed(1)
    assert restored.kl() == expected


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: Laplace(scale=0.0), r"Laplace\(scale\) must be a positive"),
        (lambda: Laplace(mean=math.nan), r"Laplace\(mean\) must be finite"),
        (lambda: ScaleMixture(pi=1.0), r"ScaleMixture\(pi\) must lie between 0 and 1"),
        (lambda: ScaleMixture(std1=-1.0), r"ScaleMixture\(std1\) must be a positive"),
        (lambda: ScaleMixture(std2=0), r"ScaleMixture\(std2\) must be a positive"),
    ],
)
def test_bad_arguments_are_refused(make, found):
    with pytest.raises(bnnify.ConversionError, match=found):
        make()


@pytest.mark.parametrize("shape", [(4,), (3, 4)])
def test_a_prior_of_ones_own_may_have_a_std_for_each_weight(shape):
    std = torch.rand(shape) + 0.1

    class OwnStds(bnnify.Prior):
        def kl(self, posterior):
            return self.terms(posterior).kl(posterior)

        def terms(self, posterior):
            return KLTerms(-0.5, 0.0, std)

    bnn = bnnify.convert(torch.nn.Linear(4, 3, bias=False), posterior_std=0.1, prior=OwnStds())
    posterior, prior = Normal(bnn.module.weight, 0.1), Normal(torch.zeros(3, 4), std.expand(3, 4))
    expected = kl_divergence(posterior, prior).sum()
    torch.testing.assert_close(bnn.kl(), expected)
    torch.testing.assert_close(bnn(torch.ones(1, 4))[1], expected)
