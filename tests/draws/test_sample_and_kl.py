"""The sample and its KL in one function: the same numbers as from the two by themselves, and where it is used."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import bnnify
from bnnify.distributions.prior import KLTerms, Posterior
from bnnify.draws import sample_and_kl as fused
from bnnify.draws.sample import sample
from bnnify.draws.sample_and_kl import can_fuse, sample_and_kl
from bnnify.modules.parameters import unique_bayesian_parameters
from tests import zoo

PRIORS = (
    bnnify.Gaussian(std=0.1),
    bnnify.Gaussian(mean=0.3, std=2.0),
    bnnify.Pretrained(std=0.05),
    bnnify.Pretrained(),
    bnnify.ScaleMixture(),
    bnnify.ScaleMixture(pi=0.25, std1=0.01, std2=1.0),
)
RHOS = (-5.0, -0.5, 0.0, 3.0, 30.0, -59.0, -61.0, -95.0, -200.0, -16000.0)


class Tensors:
    """One parameter with its noise, gradients to feed back, and what the two ways make of them."""

    def __init__(self, prior, shape=(6, 5), rho=-2.0, dtype=torch.float64, monkeypatch=None):
        generator = torch.Generator().manual_seed(0)
        normal = lambda: torch.randn(shape, generator=generator, dtype=dtype)  # noqa: E731
        self.prior, self.noise = prior, normal()
        self.mean = (0.3 * normal()).requires_grad_()
        self.rho = (rho + 0.1 * normal()).requires_grad_()
        self.posterior = Posterior(self.mean, self.rho, 0.3 * normal(), torch.tensor(0.1, dtype=dtype))
        self.grads = normal(), torch.tensor(0.7, dtype=dtype)
        monkeypatch.setattr(fused, "noise_like", lambda mean: self.noise.clone())

    def fused(self):
        terms = self.prior.fast_terms(self.posterior)
        assert can_fuse(self.mean, self.rho, terms)
        return sample_and_kl(self.mean, self.rho, terms)

    def apart(self):
        terms = self.prior.fast_terms(self.posterior)
        return sample(self.mean, self.rho, self.noise), terms.kl(self.posterior).sum()

    def gradients(self, outputs):
        return torch.autograd.grad(outputs, (self.mean, self.rho), self.grads)


@pytest.mark.parametrize("prior", PRIORS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values_and_gradients_are_those_of_the_two_apart(prior, dtype, monkeypatch):
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    for rho in RHOS:
        tensors = Tensors(prior, rho=rho, dtype=dtype, monkeypatch=monkeypatch)
        found, expected = tensors.fused(), tensors.apart()
        assert torch.equal(found[0], expected[0]), rho
        torch.testing.assert_close(found[1], expected[1], **tolerance)
        torch.testing.assert_close(tensors.gradients(found), tensors.gradients(expected), **tolerance)


@pytest.mark.parametrize("prior", PRIORS, ids=str)
def test_gradients_are_those_of_finite_differences_to_second_order(prior, monkeypatch):
    tensors = Tensors(prior, shape=(3, 2), monkeypatch=monkeypatch)

    def both(mean, rho):
        return sample_and_kl(mean, rho, prior.fast_terms(tensors.posterior))

    assert torch.autograd.gradcheck(both, (tensors.mean, tensors.rho))
    assert torch.autograd.gradgradcheck(both, (tensors.mean, tensors.rho))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels last"])
def test_large_tensors_are_worked_on_in_blocks_without_a_difference(layout, monkeypatch):
    monkeypatch.setattr(fused, "_BLOCK", 7)
    tensors = Tensors(bnnify.Pretrained(std=0.05), shape=(4, 3, 2, 2), monkeypatch=monkeypatch)
    if layout == "transposed":
        tensors.mean = tensors.mean.detach().transpose(0, 3).contiguous().transpose(0, 3).requires_grad_()
    if layout == "channels last":
        tensors.mean = tensors.mean.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        tensors.rho = tensors.rho.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    tensors.posterior = tensors.posterior._replace(mean=tensors.mean, rho=tensors.rho)
    (drawn, kl), (expected, expected_kl) = tensors.fused(), tensors.apart()
    torch.testing.assert_close((drawn, kl), (expected, expected_kl))
    torch.testing.assert_close(tensors.gradients((drawn, kl)), tensors.gradients((expected, expected_kl)))


@pytest.mark.parametrize("frozen", ["mean", "rho"])
def test_a_frozen_argument_gets_no_gradient(frozen, monkeypatch):
    tensors = Tensors(bnnify.Gaussian(), monkeypatch=monkeypatch)
    getattr(tensors, frozen).requires_grad_(False)
    free = tensors.rho if frozen == "mean" else tensors.mean
    found, expected = (torch.autograd.grad(ways(), free, tensors.grads) for ways in (tensors.fused, tensors.apart))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("used", [0, 1], ids=["sample", "KL"])
def test_either_may_be_used_alone(used, monkeypatch):
    tensors = Tensors(bnnify.Gaussian(), monkeypatch=monkeypatch)
    inputs = (tensors.mean, tensors.rho)
    found, expected = (
        torch.autograd.grad(ways()[used], inputs, tensors.grads[used], allow_unused=True)
        for ways in (tensors.fused, tensors.apart)
    )
    torch.testing.assert_close(found, expected)


def test_a_graph_that_is_kept_gives_the_same_gradients_again(monkeypatch):
    tensors = Tensors(bnnify.Gaussian(), monkeypatch=monkeypatch)
    outputs = tensors.fused()
    first, second = (
        torch.autograd.grad(outputs, (tensors.mean, tensors.rho), tensors.grads, retain_graph=True) for _ in range(2)
    )
    third = tensors.gradients(outputs)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, third, rtol=0, atol=0)


def test_only_the_noise_is_kept_for_backward_beside_the_sample():
    bnn = bnnify.convert(nn.Linear(50, 40, bias=False), prior=bnnify.Gaussian(std=0.1))
    parameters = {parameter.data_ptr() for parameter in bnn.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x = torch.randn(3, 50, requires_grad=True)  # so that the layer keeps its weight, the sample
        output, _ = bnn(x)
    weights = 50 * 40 * 4
    assert sum(kept.values()) <= 2 * weights + x.nbytes + output.nbytes + 100


@pytest.mark.parametrize("name", ["mlp", "bfloat16", "float64", "lstm", "tied_language_model"])
def test_a_forward_computes_every_parameter_and_its_kl_in_one_function(name):
    bnn = bnnify.convert(zoo.build(name)[0], prior=bnnify.ScaleMixture())
    for parameter in unique_bayesian_parameters(bnn):
        # Half precision is widened first, which is left to autograd.
        assert (parameter.sample_and_kl() is None) == (parameter.mean.dtype == torch.bfloat16)


@pytest.mark.parametrize(
    "prior", [bnnify.Gaussian(std="learned"), bnnify.Laplace(), bnnify.Gaussian(std=1e-14)], ids=str
)
def test_other_priors_are_computed_by_themselves(prior):
    bnn = bnnify.convert(nn.Linear(3, 2), prior=prior)
    assert all(parameter.sample_and_kl() is None for parameter in unique_bayesian_parameters(bnn))
    assert torch.equal(bnn(torch.ones(1, 3))[1], bnn.kl())


@pytest.mark.parametrize("prior", PRIORS, ids=str)
def test_the_kl_by_itself_is_the_same_to_the_bit_and_has_the_same_gradients(prior, monkeypatch):
    tensors = Tensors(prior, monkeypatch=monkeypatch)
    inputs = (tensors.mean, tensors.rho)
    alone = fused.kl_of(*inputs, prior.fast_terms(tensors.posterior))
    assert torch.equal(alone, tensors.fused()[1])
    found, expected = (
        torch.autograd.grad(kl, inputs, create_graph=create_graph, allow_unused=True)
        for kl, create_graph in ((alone, False), (tensors.apart()[1], True))
    )
    zeros = torch.zeros_like(tensors.mean)
    torch.testing.assert_close(found, tuple(zeros if grad is None else grad for grad in expected))


class OnlyLooksOn(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("where", ["forward", "backward", "both"])
def test_a_region_may_be_run_again_without_the_mode_that_looked_on(where):
    def gradients(looked_on):
        torch.manual_seed(0)
        bnn = bnnify.convert(nn.Linear(4, 3), prior=bnnify.Gaussian(std=0.1))
        x = torch.ones(5, 4, requires_grad=True)
        with OnlyLooksOn() if looked_on and where != "backward" else nullcontext():
            output, kl = checkpoint(bnn, x, use_reentrant=False)
        with OnlyLooksOn() if looked_on and where != "forward" else nullcontext():
            (output.square().sum() + kl).backward()
        return [p.grad for p in bnn.parameters()]

    torch.testing.assert_close(gradients(True), gradients(False))


def test_fake_tensors_are_left_to_operations_that_they_know():
    bnn = bnnify.convert(nn.Linear(4, 3), prior=bnnify.Gaussian(std=0.1))
    with FakeTensorMode(allow_non_fake_inputs=True):
        output, kl = bnn(torch.ones(5, 4))
    assert output.shape == (5, 3)
    assert kl.shape == ()


def test_mixed_dtypes_are_left_to_autograd():
    one = torch.ones(3)
    assert can_fuse(one, one, KLTerms(0.0, one, 1.0))
    assert not can_fuse(one, one, KLTerms(0.0, one.double(), 1.0))
    assert not can_fuse(one, one.double(), KLTerms(0.0, one, 1.0))
    assert can_fuse(one, one, KLTerms(0.0, one, torch.tensor(1.0, dtype=torch.float64)))  # a number beside them


def test_a_sparse_gradient_is_made_dense(monkeypatch):
    tensors = Tensors(bnnify.Gaussian(), monkeypatch=monkeypatch)
    dense = tensors.grads[0]
    dense[1:] = 0.0
    expected = tensors.gradients(tensors.apart())
    tensors.grads = dense.to_sparse(1), tensors.grads[1]
    drawn, kl = tensors.fused()
    torch.testing.assert_close(tensors.gradients((drawn, kl)), expected)


class Learning(bnnify.Pretrained):
    """Centred on a tensor that somebody trains."""

    def __init__(self, centre):
        super().__init__(std=0.5)
        object.__setattr__(self, "centre", centre)

    def kl(self, posterior):
        return self.terms(posterior).kl(posterior)

    def terms(self, posterior):
        return KLTerms(-0.5, self.centre, self.std)


def test_a_prior_of_the_users_own_that_learns_its_mean_gets_its_gradient():
    centre = torch.zeros(2, 3, requires_grad=True)
    bnn = bnnify.convert(nn.Linear(3, 2, bias=False), prior=Learning(centre))
    bnn(torch.ones(1, 3))[1].backward()
    torch.testing.assert_close(centre.grad, -bnn.module.weight / 0.5**2)


class Doubled(bnnify.Gaussian):
    def kl(self, posterior):
        return 2 * super().kl(posterior)


class DoubledMixture(bnnify.ScaleMixture):
    def kl(self, posterior):
        return 2 * super().kl(posterior)


def test_a_prior_derived_from_ours_is_asked_for_its_own_kl():
    x = torch.ones(1, 3)
    model = nn.Linear(3, 2)
    single, double = (bnnify.convert(model, prior=prior) for prior in (bnnify.Gaussian(), Doubled()))
    torch.testing.assert_close(double(x)[1], 2 * single(x)[1])
    found = []
    for prior in (bnnify.ScaleMixture(), DoubledMixture()):
        torch.manual_seed(0)
        found.append(bnnify.convert(model, prior=prior)(x)[1])
    torch.testing.assert_close(found[1], 2 * found[0])


def test_the_kl_of_a_fresh_conversion_stays_zero_for_a_million_weights():
    bnn = bnnify.convert(nn.Linear(1000, 1000, bias=False), prior=bnnify.Pretrained())
    assert bnn(torch.ones(1, 1000))[1].abs() < 0.1  # 1e-7 of a weight's share
