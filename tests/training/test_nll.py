"""Likelihoods: values against torch.distributions, gradients, draws, learned noise, and shapes that are refused."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Bernoulli, Categorical, Normal

import bnnify
from bnnify import BernoulliNLL, CategoricalNLL, GaussianNLL, HeteroscedasticGaussianNLL


class _MeanAndVariance(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        mean, raw = self.linear(x).unbind(-1)
        return mean, F.softplus(raw) + 1e-3


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


SHAPES = [(), (7,), (7, 1), (7, 3), (2, 7, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_gaussian_is_minus_the_log_density_of_the_noise(shape):
    for std in [0.1, 1.0, 30.0]:
        output, y = normal(*shape), normal(*shape)
        nll = GaussianNLL(std=torch.tensor(std, dtype=torch.float64))
        torch.testing.assert_close(nll(output, y), -Normal(output, std).log_prob(y).mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_heteroscedastic_gaussian_is_minus_the_log_density_of_the_predicted_noise(shape):
    mean, variance, y = normal(*shape), normal(*shape).exp(), normal(*shape)
    expected = -Normal(mean, variance.sqrt()).log_prob(y).mean()
    torch.testing.assert_close(HeteroscedasticGaussianNLL()((mean, variance), y), expected)


@pytest.mark.parametrize("shape", [(), (7,), (7, 4), (2, 4, 3)])
@pytest.mark.parametrize("class_dim", [-1, 0])
def test_categorical_is_minus_the_log_probability_of_the_class(shape, class_dim):
    logits, y = normal(*shape, 5), torch.randint(5, shape)
    expected = -Categorical(logits=logits).log_prob(y).mean()
    torch.testing.assert_close(CategoricalNLL(class_dim)(logits.movedim(-1, class_dim), y), expected)


def test_categorical_in_segmentation_is_cross_entropy_and_ignores_what_it_is_told_to():
    logits, y = normal(2, 5, 4, 3), torch.randint(5, (2, 4, 3))
    y[0, :2] = 255
    nll = CategoricalNLL(class_dim=1, ignore_index=255)
    torch.testing.assert_close(nll(logits, y), F.cross_entropy(logits, y, ignore_index=255))
    draws = normal(3, 2, 5, 4, 3)
    torch.testing.assert_close(nll(draws, y), torch.stack([nll(draw, y) for draw in draws]).mean())
    assert not torch.allclose(nll(logits, y), CategoricalNLL(class_dim=1)(logits, y.clamp(max=4)))


def test_bernoulli_is_minus_the_log_probability_of_the_answer():
    logits, y = normal(7, 3), torch.randint(2, (7, 3))
    expected = -Bernoulli(logits=logits).log_prob(y.double()).mean()
    torch.testing.assert_close(BernoulliNLL()(logits, y), expected)
    torch.testing.assert_close(BernoulliNLL()(logits, y.bool()), expected)


def likelihoods():
    """Each likelihood with a Bayesian network of the kind it is for, and targets."""
    regression, classes = torch.randn(8, 2), torch.randint(2, (8,))
    linear = nn.Linear(3, 2)
    settings = {"posterior_std": 0.5}
    yield "categorical", CategoricalNLL(), bnnify.convert(linear, **settings), classes
    yield "bernoulli", BernoulliNLL(), bnnify.convert(linear, **settings), F.one_hot(classes)
    yield "gaussian", GaussianNLL(std=0.3), bnnify.convert(linear, **settings), regression
    yield "predicted", HeteroscedasticGaussianNLL(), bnnify.convert(_MeanAndVariance(), **settings), regression[:, 0]


NAMES = ["categorical", "bernoulli", "gaussian", "predicted"]


def case(wanted):
    return next(rest for name, *rest in likelihoods() if name == wanted)


def draws_of(output):
    return list(zip(*output, strict=True)) if isinstance(output, (tuple, list)) else list(output)


@pytest.mark.parametrize("name", NAMES)
def test_of_several_draws_it_is_the_mean_over_the_draws(name):
    nll, bnn, y = case(name)
    output = bnn.sample(torch.randn(8, 3), num_samples=4)
    separately = [nll(draw, y) for draw in draws_of(output)]
    torch.testing.assert_close(nll(output, y), torch.stack(separately).mean())
    assert nll(output, y).shape == ()


def test_the_elbo_with_it_is_a_bound_on_the_log_evidence():
    # One weight, f = w·x: the evidence of the data is that of a Gaussian, and the exact posterior attains the bound.
    x, noise, prior_std = normal(20, 1), 0.3, 0.8
    y = 0.5 * x + noise * normal(20, 1)
    covariance = noise**2 * torch.eye(20, dtype=torch.float64) + prior_std**2 * x @ x.T
    zeros = torch.zeros(20, dtype=torch.float64)
    log_evidence = torch.distributions.MultivariateNormal(zeros, covariance).log_prob(y[:, 0])
    precision = x.square().sum() / noise**2 + prior_std**-2
    mean, std = (x * y).sum() / noise**2 / precision, precision**-0.5
    nll = GaussianNLL(std=torch.tensor(noise, dtype=torch.float64))

    def bound(mean, std):
        linear = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        nn.init.constant_(linear.weight, mean)
        bnn = bnnify.convert(linear, prior=bnnify.Gaussian(std=prior_std), posterior_std=float(std))
        with torch.no_grad():
            return -20 * bnnify.elbo(nll(bnn.sample(x, num_samples=4000), y), bnn.kl(), num_data=20)

    assert bound(mean, std).item() == pytest.approx(log_evidence.item(), abs=0.1)
    assert bound(mean, 2 * std) < log_evidence - 0.3
    assert bound(mean + 2 * std, std) < log_evidence - 0.5


def test_gradcheck():
    y, classes = normal(6), torch.randint(4, (6,))
    output, raw, logits = (normal(*shape).requires_grad_() for shape in ((3, 6), (3, 6), (3, 6, 4)))
    learned = GaussianNLL(std=torch.tensor(0.7, dtype=torch.float64), learned=True)
    assert torch.autograd.gradcheck(lambda out, log_std: learned(out, y), (output, learned.log_std))
    assert torch.autograd.gradcheck(lambda out, raw: HeteroscedasticGaussianNLL()((out, raw.exp()), y), (output, raw))
    assert torch.autograd.gradcheck(lambda out: CategoricalNLL()(out, classes), logits)
    assert torch.autograd.gradcheck(lambda out: BernoulliNLL()(out, (y > 0)), output)


@pytest.mark.parametrize("shape", [(), (2,)])
def test_a_learned_std_becomes_the_root_mean_square_of_the_residuals(shape):
    scale = torch.tensor([0.2, 3.0]) if shape else torch.tensor(0.2)
    residuals = scale * torch.randn(500, 2)
    nll = GaussianNLL(std=torch.ones(shape), learned=True)
    optimizer = torch.optim.LBFGS(nll.parameters(), line_search_fn="strong_wolfe", max_iter=100)

    def closure():
        optimizer.zero_grad()
        loss = nll(residuals, torch.zeros(500, 2))
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = residuals.square().mean(0 if shape else None).sqrt()
    torch.testing.assert_close(nll.std, expected, rtol=1e-3, atol=0)


def test_only_a_learned_std_is_a_parameter_and_both_are_saved():
    fixed, learned = GaussianNLL(std=0.1), GaussianNLL(std=0.1, learned=True)
    assert list(fixed.parameters()) == []
    assert [name for name, _ in learned.named_parameters()] == ["log_std"]
    assert fixed.std.item() == pytest.approx(0.1)
    learned.load_state_dict(GaussianNLL(std=2.0).state_dict())
    assert learned.std.item() == pytest.approx(2.0)
    assert "learned=True" in repr(learned)


def test_one_std_for_each_output():
    output, y, std = normal(4, 7, 2), normal(7, 2), torch.tensor([0.1, 5.0], dtype=torch.float64)
    expected = -Normal(output, std).log_prob(y).mean()
    torch.testing.assert_close(GaussianNLL(std=std)(output, y), expected)


def test_a_std_that_is_not_positive_is_refused():
    for std in [0.0, -1.0, math.inf, math.nan, torch.tensor([1.0, 0.0])]:
        with pytest.raises(ValueError, match="std must be positive and finite"):
            GaussianNLL(std=std)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_computed_in_single(name):
    for dtype in [torch.float16, torch.bfloat16]:
        nll, bnn, y = case(name)
        output = bnn.sample(torch.randn(8, 3), num_samples=2)
        half = tuple(part.to(dtype) for part in output) if isinstance(output, (tuple, list)) else output.to(dtype)
        wide = tuple(part.float() for part in half) if isinstance(half, tuple) else half.float()
        assert nll(half, y).dtype == torch.float32
        assert nll(half, y) == nll(wide, y)


def test_a_criterion_in_half_precision_still_computes_in_single():
    nll = GaussianNLL(std=1e-6).half()  # whose reciprocal no float16 holds
    assert nll(torch.zeros(4), torch.full((4,), 1e-6)).isfinite()


@pytest.mark.parametrize("nll", [BernoulliNLL(), GaussianNLL(std=1.0), HeteroscedasticGaussianNLL()])
def test_what_would_broadcast_is_refused_with_both_shapes(nll):
    for output, target in [
        *(((8, 1), (8,)), ((8,), (8, 1)), ((8, 1), (8, 3)), ((1, 3), (8, 3)), ((3,), (8, 3)), ((8,), ()), ((), (8,))),
        *(((4, 8, 1), (8,)), ((4, 2, 8), (8,)), ((4, 8), (8, 4))),  # as if of several draws
    ]:
        outputs = torch.ones(output)
        found = (outputs, outputs) if isinstance(nll, HeteroscedasticGaussianNLL) else outputs
        with pytest.raises(ValueError, match=f"{type(nll).__name__} got an output") as error:
            nll(found, torch.ones(target))
        assert f"shape {output} " in str(error.value)
        assert f"shape {target}." in str(error.value)
        assert "bnn.sample" in str(error.value)


def test_logits_that_do_not_fit_their_labels_are_refused_with_both_shapes():
    for output, target, class_dim in [
        *(((8, 5), (8, 1), -1), ((8, 5), (7,), -1), ((8, 5), (8, 5), -1), ((8, 5), (), -1), ((8, 5), (8,), 2)),
        *(((2, 5, 4, 3), (2, 4, 3), -1), ((4, 1, 5), (8,), -1), ((2, 4, 8, 5), (8,), -1)),
    ]:
        with pytest.raises(ValueError, match=f"classes along dimension {class_dim}") as error:
            CategoricalNLL(class_dim)(torch.zeros(output), torch.zeros(target, dtype=torch.long))
        assert f"shape {output} " in str(error.value)
        assert f"shape {target}." in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_labels_that_are_not_numbers_of_classes_are_refused(dtype):
    with pytest.raises(ValueError, match=f"integers, not {dtype}"):
        CategoricalNLL()(torch.zeros(8, 5), torch.zeros(8, dtype=dtype))
    labels = torch.randint(5, (8,))
    assert CategoricalNLL()(torch.eye(8, 5), labels.byte()) == CategoricalNLL()(torch.eye(8, 5), labels)


def test_a_mean_and_a_variance_of_different_shapes_are_refused():
    for mean, variance in itertools.permutations([torch.ones(4, 8), torch.ones(8)]):
        with pytest.raises(ValueError, match=r"and a variance of shape \((4, )?8,?\)"):
            HeteroscedasticGaussianNLL()((mean, variance), torch.ones(8))


def test_an_output_that_is_not_a_pair_is_refused():
    for output in [torch.ones(8), (torch.ones(8),), {"mean": torch.ones(8)}, (torch.ones(8), 1.0)]:
        with pytest.raises(TypeError, match=r"a pair of tensors \(mean, variance\), but got"):
            HeteroscedasticGaussianNLL()(output, torch.ones(8))


def test_a_std_that_does_not_broadcast_to_the_target_is_refused():
    with pytest.raises(ValueError, match=r"std of shape \(8,\).*target's \(4, 2\)"):
        GaussianNLL(std=torch.ones(8))(torch.ones(4, 2), torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"std of shape \(4, 2\).*target's \(2,\)"):
        GaussianNLL(std=torch.ones(4, 2))(torch.ones(2), torch.ones(2))
