"""The mean-field Gaussian: σ(ρ), its logarithm and inverse, the reparameterized sample, and how σ starts."""

import decimal
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnnify
from bnnify import Moped, Relative
from bnnify.distributions.gaussian import log_std, rho_from_std, std
from bnnify.draws.sample import _Reparameterize, sample

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
RHOS = (
    -200,
    -110,
    -104,
    -90,
    -41,
    -40,
    -39.5,
    -21,
    -20,
    -19.5,
    -10,
    -3,
    -1,
    -0.5,
    0,
    0.5,
    1,
    5,
    10,
    19.5,
    20.5,
    30,
    41,
)
RHOS += (88, 100, 200)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


def wide(dtype):
    return dtype if dtype == torch.float64 else torch.float32


def exactly(function, rhos):
    """``function(e^ρ)`` in as many digits as 1 + e^ρ needs, rounded once to float64."""
    results = []
    for rho in rhos.double().tolist():
        with decimal.localcontext() as context:
            context.prec = 60 + math.ceil(abs(rho))
            results.append(float(function(decimal.Decimal(rho).exp())))
    return torch.tensor(results, dtype=torch.float64)


def softplus(e):
    return (1 + e).ln()


def log_softplus(e):
    return softplus(e).ln()


def log_softplus_gradient(e):
    return e / (1 + e) / softplus(e)


def plain_sample(mean, rho, eps):
    """The reference for the autograd function."""
    return mean + F.softplus(rho, threshold=40) * eps


def parameters(*shape, dtype=torch.float64):
    return [torch.randn(*shape, dtype=dtype).requires_grad_() for _ in range(3)]


# σ(ρ)


def test_std_is_softplus_to_the_precision_of_the_dtype(dtype):
    rho = torch.tensor(RHOS, dtype=dtype)
    expected = exactly(softplus, rho)
    info = torch.finfo(dtype)
    assert ((std(rho).double() - expected).abs() <= 4 * info.eps * expected + info.smallest_normal * info.eps).all()


def test_log_std_is_right_to_the_precision_of_float32_or_better(dtype):
    rho = torch.tensor(RHOS, dtype=dtype)
    expected = exactly(log_softplus, rho)
    assert log_std(rho).dtype == wide(dtype)
    bound = 4 * torch.finfo(wide(dtype)).eps * expected.abs().clamp(min=1)
    assert ((log_std(rho).double() - expected).abs() <= bound).all()


def test_gradient_of_log_std_is_right(dtype):
    rho = torch.tensor(RHOS, dtype=dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad(log_std(rho).sum(), rho)
    expected = exactly(log_softplus_gradient, rho.detach())
    torch.testing.assert_close(gradient.double(), expected, rtol=8 * torch.finfo(dtype).eps, atol=0)


def test_gradient_of_std_is_the_sigmoid(dtype):
    rho = torch.tensor(RHOS, dtype=dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad(std(rho).sum(), rho)
    info = torch.finfo(dtype)
    expected = exactly(lambda e: e / (1 + e), rho.detach())
    torch.testing.assert_close(gradient.double(), expected, rtol=4 * info.eps, atol=info.smallest_normal * info.eps)


def test_log_std_and_its_gradient_follow_their_asymptotes_to_the_ends_of_the_dtype(dtype):
    info = torch.finfo(dtype)
    rho = torch.tensor([info.min, info.max], dtype=dtype, requires_grad=True)
    value = log_std(rho)
    (gradient,) = torch.autograd.grad(value.sum(), rho)
    torch.testing.assert_close(value.double(), torch.tensor([info.min, math.log(info.max)], dtype=torch.float64))
    assert gradient[0] == 1
    torch.testing.assert_close(gradient[1].double(), torch.tensor(1 / info.max, dtype=torch.float64), rtol=0.01, atol=0)


def test_log_std_has_no_jump_and_no_kink_anywhere():
    rho = torch.linspace(-60, 60, 24001, dtype=torch.float64, requires_grad=True)
    value = log_std(rho)
    (slope,) = torch.autograd.grad(value.sum(), rho)
    step = rho[1] - rho[0]
    trapezoid = value[:-1] + step * (slope[1:] + slope[:-1]) / 2
    torch.testing.assert_close(value[1:], trapezoid, rtol=0, atol=1e-8)


def test_rho_from_std_inverts_std(dtype):
    stds = torch.logspace(-4, 3, 141, dtype=torch.float64).to(dtype)
    rho = rho_from_std(stds)
    # ρ is rounded to its dtype: an error of |ρ|·eps in ρ is at most one of that size, relatively, in σ.
    relative = (std(rho.double()) / stds.double() - 1).abs()
    assert (relative <= torch.finfo(dtype).eps * (rho.double().abs() + 2)).all()


def test_no_std_becomes_zero_or_infinite(dtype):
    for value in (0.0, 1e-300, 1e-45, 1e-12, 1e30, 1e300, math.inf):
        rho = rho_from_std(torch.tensor(value, dtype=dtype))
        assert rho.isfinite(), value
        assert 0 < std(rho) < math.inf, value


# The sample


def test_sample_passes_gradcheck_and_gradgradcheck():
    inputs = parameters(3, 4)
    assert torch.autograd.gradcheck(_Reparameterize.apply, inputs)
    assert torch.autograd.gradgradcheck(_Reparameterize.apply, inputs)


def test_sample_equals_the_plain_expression_with_the_same_noise(dtype):
    mean, rho, _ = parameters(50, 7, dtype=dtype)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        drawn = sample(mean, rho)
        torch.manual_seed(1)
        eps = torch.randn_like(mean)
    assert drawn.dtype == dtype
    # The fused multiply-add rounds once where the plain expression rounds three times.
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(drawn, plain_sample(mean, rho, eps), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("frozen", [(), (0,), (1,)], ids=["all", "frozen mean", "frozen rho"])
def test_gradients_equal_those_of_the_plain_expression_to_second_order(frozen):
    inputs = parameters(5, 2)
    for index in frozen:
        inputs[index].requires_grad_(False)
    trained = [tensor for tensor in inputs if tensor.requires_grad]
    found = []
    for function in (_Reparameterize.apply, plain_sample):
        first = torch.autograd.grad((function(*inputs) ** 3).sum(), trained, create_graph=True)
        second = torch.autograd.grad(sum((gradient**2).sum() for gradient in first), trained)
        found.append([*first, *second])
    torch.testing.assert_close(*found)


def test_gradient_of_sample_is_finite_wherever_rho_is(dtype):
    mean = torch.zeros(len(RHOS), dtype=dtype, requires_grad=True)
    rho = torch.tensor(RHOS, dtype=dtype, requires_grad=True)
    drawn = sample(mean, rho)
    gradients = torch.autograd.grad(drawn.sum(), (mean, rho))
    assert all(tensor.isfinite().all() for tensor in (drawn, *gradients))
    assert (gradients[0] == 1).all()


def test_only_rho_and_the_noise_are_kept_for_backward():
    mean, rho, _ = parameters(4, 3, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        drawn = sample(mean, rho)
    assert [tensor.shape for tensor in kept] == [rho.shape] * 2
    assert kept[0].data_ptr() == rho.data_ptr()
    torch.testing.assert_close(drawn, plain_sample(mean, rho, kept[1]))


def test_vmap_over_sample_draws_for_each_entry():
    means, rhos, eps = parameters(6, 3)
    mapped = torch.func.vmap(_Reparameterize.apply)(means, rhos, eps)
    torch.testing.assert_close(mapped, plain_sample(means, rhos, eps))
    drawn = torch.func.vmap(sample, randomness="different")(torch.zeros(6, 3), torch.zeros(6, 3))
    assert drawn.unique(dim=0).shape == (6, 3)


def test_vmap_of_grad_equals_that_of_the_plain_expression():
    for argument in [0, 1, 2]:
        inputs = [tensor.detach() for tensor in parameters(6, 3)]
        per_entry = [
            torch.func.vmap(torch.func.grad(lambda *args, f=function: f(*args).square().sum(), argnums=argument))(
                *inputs
            )
            for function in (_Reparameterize.apply, plain_sample)
        ]
        torch.testing.assert_close(*per_entry)


# The distribution of draws


def layers(dtype=torch.float32):
    """Three Bayesian layers of one shape, with σ different from weight to weight."""
    bnn = bnnify.convert(nn.Sequential(*(nn.Linear(20, 20, bias=False, dtype=dtype) for _ in range(3))))
    with torch.no_grad():
        for layer in bnn.module:
            layer.weight_rho.uniform_(-5, 1)
    return bnn


def standardized_draws(bnn, num_draws=200):
    """(w - μ)/σ of every weight in every draw: ``(draws, parameters, elements)``."""
    means = torch.stack([layer.weight for layer in bnn.module]).double()
    stds = torch.stack([std(layer.weight_rho.double()) for layer in bnn.module])
    draws = []
    for _ in range(num_draws):
        with bnn.draw():
            draws.append((torch.stack([layer.weight for layer in bnn.module]).double() - means) / stds)
    return torch.stack(draws).detach().flatten(2)


def check_standard_normal(z, slack=0.0):
    """Every entry N(0, 1) and independent of the others; a right sampler exceeds 5 standard errors nowhere."""
    draws, parameters, elements = z.shape
    n = z.numel()
    assert z.mean().abs() < 5 / n**0.5 + slack
    assert (z.var() - 1).abs() < 5 * (2 / n) ** 0.5 + slack
    quantiles = (torch.arange(n, dtype=z.dtype) + 0.5) / n
    kolmogorov_smirnov = (torch.special.ndtr(z.flatten().sort().values) - quantiles).abs().max()
    assert kolmogorov_smirnov < 2.2 / n**0.5 + slack
    # Each weight by itself, over draws; and each tensor by itself, within a draw.
    assert (z.mean(0).abs() * draws**0.5).max() < 5
    assert (z.mean(2).abs() * elements**0.5).max() < 5
    between_parameters = torch.corrcoef(z.transpose(0, 1).reshape(parameters, -1)) - torch.eye(
        parameters, dtype=z.dtype
    )
    assert between_parameters.abs().max() < 5 / (draws * elements) ** 0.5
    between_draws = (z[1:] * z[:-1]).mean()
    assert between_draws.abs() < 5 / n**0.5


def wrong_by(noise):
    return lambda mean, rho, given: mean + std(rho) * noise(mean)


def reusing(choose):
    """Noise that is what ``choose`` takes from all the noise before it, three parameters to a draw, or else fresh."""
    history = []

    def noise(mean):
        reused = choose(history)
        history.append(torch.randn_like(mean) if reused is None else reused)
        return history[-1]

    return noise


WRONG = {
    "std 5 % too large": lambda mean: 1.05 * torch.randn_like(mean),
    "std 5 % too small": lambda mean: 0.95 * torch.randn_like(mean),
    "biased": lambda mean: torch.randn_like(mean) + 0.05,
    "uniform": lambda mean: (torch.rand_like(mean) - 0.5) * 12**0.5,
    "laplace": lambda mean: torch.distributions.Laplace(0.0, 0.5**0.5).sample(mean.shape),
    "sign": lambda mean: torch.randn_like(mean).sign(),
    "one number for a tensor": lambda mean: torch.randn(()),
    "one row for a tensor": lambda mean: torch.randn_like(mean[:1]),
    "none": torch.zeros_like,
    "shared between parameters": reusing(lambda history: history[-1] if len(history) % 3 else None),
    "kept between draws": reusing(lambda history: history[-3] if len(history) >= 3 else None),
    "antithetic": reusing(lambda history: -history[-3] if len(history) // 3 % 2 else None),
}


@pytest.mark.parametrize("seed", range(3))
def test_draws_are_independent_gaussians(seed):
    torch.manual_seed(seed)
    check_standard_normal(standardized_draws(layers()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_draws_are_independent_gaussians_in_other_dtypes(dtype):
    bnn = layers(dtype)
    with torch.no_grad():
        for layer in bnn.module:
            layer.weight.zero_()  # so that half precision resolves the noise
    # σ and the sample are rounded to 8 bits in bfloat16.
    check_standard_normal(standardized_draws(bnn), slack=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("noise", WRONG.values(), ids=WRONG.keys())
def test_the_checker_rejects_wrong_samplers(noise, monkeypatch):
    bnn = layers()
    monkeypatch.setattr("bnnify.modules.mean_field.sample", wrong_by(noise))
    z = standardized_draws(bnn)
    with pytest.raises(AssertionError):
        check_standard_normal(z)


# How σ starts


def initial_std(weight, rule, **layer):
    """The σ that a Linear layer with this weight gets for it, in float64."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
    return std(bnnify.convert(linear, posterior_std=rule).module.weight_rho.detach().double())


def close(actual, expected, dtype):
    """Equal up to the rounding of ρ, whose size here is below 32."""
    torch.testing.assert_close(actual, expected, rtol=32 * torch.finfo(dtype).eps, atol=0)


def test_number_is_the_same_std_for_every_weight(dtype):
    weight = torch.randn(5, 4, dtype=dtype)
    close(initial_std(weight, 0.03), torch.full((5, 4), 0.03, dtype=torch.float64), dtype)


def test_relative_is_a_fraction_of_the_rms(dtype):
    weight = torch.randn(5, 4, dtype=dtype)
    expected = 0.3 * weight.double().square().mean().sqrt()
    close(initial_std(weight, Relative(0.3)), expected.expand(5, 4), dtype)


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e15, 1e25])
def test_relative_is_a_fraction_of_the_rms_also_where_squares_leave_float32(scale):
    weight = scale * torch.randn(5, 4)
    expected = 0.3 * weight.double().square().mean().sqrt()
    torch.testing.assert_close(initial_std(weight, Relative(0.3)), expected.expand(5, 4), rtol=2e-5, atol=0)


@pytest.mark.parametrize(("units", "share"), [(4, 0.5), (16, 1.0), (64, 1.0)])
def test_a_layer_of_few_units_gets_less_of_the_fraction_when_a_full_width_is_given(units, share):
    weight = torch.randn(units, 3, dtype=torch.float64)
    expected = (0.3 * share * weight.square().mean().sqrt()).expand(units, 3)
    close(initial_std(weight, Relative(0.3, full_width=16)), expected, torch.float64)


def test_moped_is_proportional_to_each_weight(dtype):
    weight = torch.randn(5, 4, dtype=dtype).sign() * torch.linspace(0.5, 2, 20, dtype=dtype).reshape(5, 4)
    close(initial_std(weight, Moped(0.1)), 0.1 * weight.abs().double(), dtype)


def test_moped_is_floored_where_a_weight_is_zero():
    weight = torch.tensor([[0.0, 3.0], [0.0, -4.0]])
    rms = (25 / 4) ** 0.5
    floor = 1e-4 * rms
    expected = torch.tensor([[floor, 0.3], [floor, 0.4]], dtype=torch.float64)
    close(initial_std(weight, Moped(0.1)), expected, torch.float32)


@pytest.mark.parametrize(("rule", "fraction"), [(Relative(0.2), 0.2), (Moped(0.2), 2e-4)], ids=["Relative", "Moped"])
@pytest.mark.parametrize(
    ("layer", "fan_in"),
    [
        (nn.Linear(12, 5), 12),
        (nn.Conv2d(4, 6, 3), 36),
        (nn.ConvTranspose2d(4, 6, 3), 54),
        (nn.Conv1d(6, 6, 5, groups=3), 10),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_zero_tensors_fall_back_to_the_scale_of_their_layers_initialisation(layer, fan_in, rule, fraction):
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    module = bnnify.convert(layer, posterior_std=rule).module
    expected = fraction / math.sqrt(3 * fan_in)
    for rho in (module.weight_rho, module.bias_rho):
        close(std(rho.detach().double()), torch.full(rho.shape, expected, dtype=torch.float64), torch.float32)


@pytest.mark.parametrize(
    "computed",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        lambda layer: nn.utils.prune.identity(layer, "weight"),
    ],
)
def test_a_zero_bias_takes_the_scale_of_a_weight_that_is_computed(computed):
    layer = computed(nn.Linear(12, 5))
    nn.init.zeros_(layer.bias)
    found = std(bnnify.convert(layer, posterior_std=Relative(0.2)).module.bias_rho)
    torch.testing.assert_close(found, torch.full((5,), 0.2 / 6))


@pytest.mark.parametrize("rule", [Relative(0.2), Moped(0.2)], ids=str)
def test_std_is_never_zero_and_the_kl_is_finite(rule, dtype):
    for scale in (0.0, 1e-30, 1e-20, 1e-7, 1.0, 1e3):
        module = nn.Linear(5, 4, dtype=dtype)
        with torch.no_grad():
            module.weight.copy_(scale * torch.randn(5, 4).T)
        bnn = bnnify.convert(module, posterior_std=rule)
        assert (std(bnn.module.weight_rho) > 0).all(), scale
        assert bnn.kl().isfinite(), scale


@pytest.mark.parametrize("posterior_std", [1e-38, 1e-20, 1e15])
def test_extreme_stds_give_a_finite_kl_and_gradient(posterior_std):
    bnn = bnnify.convert(nn.Linear(5, 4), posterior_std=posterior_std)
    bnn.kl().backward()
    assert bnn.kl().isfinite()
    assert bnn.module.weight_rho.grad.isfinite().all()


@pytest.mark.parametrize("rule", [Relative, Moped])
def test_rules_refuse_what_is_not_a_positive_number(rule):
    for value in (0, 0.0, -1, math.nan, math.inf, "0.2", None, True):
        with pytest.raises(
            bnnify.ConversionError, match=rf"{rule.__name__}\(\w+\) must be a positive, finite number, not {value!r}"
        ):
            rule(value)


@pytest.mark.parametrize("value", [0, math.nan])
def test_a_number_must_be_positive(value):
    with pytest.raises(
        bnnify.ConversionError, match=f"posterior_std must be a positive, finite number, not {float(value)!r}"
    ):
        bnnify.convert(nn.Linear(2, 2), posterior_std=value)


@pytest.mark.parametrize("value", ["0.1", None, True, Relative, [0.1]], ids=str)
def test_an_unknown_rule_is_refused_with_what_would_do(value):
    with pytest.raises(bnnify.ConversionError, match=r"Unknown posterior_std .*Relative\(fraction\), Moped\(delta\)"):
        bnnify.convert(nn.Linear(2, 2), posterior_std=value)


def test_a_rule_of_ones_own_is_a_function_of_the_weight_and_its_layers_scale():
    weight = torch.randn(4, 3)
    largest = weight.abs().amax(1, keepdim=True).expand_as(weight)
    close(initial_std(weight, lambda weight, scale: largest), largest.double(), torch.float32)
    third = torch.full((4, 3), 1 / 3, dtype=torch.float64)
    close(initial_std(weight, lambda weight, scale: scale), third, torch.float32)


@pytest.mark.parametrize(
    ("result", "found"),
    [(torch.ones(7), r"shape \(7,\)"), (torch.tensor(-1.0), "negative"), (math.nan, "NaN"), (None, "None")],
    ids=["shape", "negative", "NaN", "None"],
)
def test_a_rule_of_ones_own_that_gives_no_std_is_refused(result, found):
    with pytest.raises(bnnify.ConversionError, match=f"posterior_std=.*`weight`.*{found}"):
        bnnify.convert(nn.Linear(2, 2), posterior_std=lambda weight, scale: result)
