"""Local reparameterization and Flipout: the noise of the output, its gradient, and where the weight sample is used."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, jacrev, vmap
from torch.utils.checkpoint import checkpoint

import bnnify
from bnnify.distributions.gaussian import std
from bnnify.draws.estimators import _AddNoise
from bnnify.modules.bayesian_class import bayesian_class
from bnnify.modules.parameters import bayesian_parameters
from tests import zoo
from tests.contract import Case, broken

ESTIMATORS = ("local", "flipout")
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)


class Inheriting(nn.Conv2d):
    """A subclass that computes what its parent computes."""


# A layer, the shape of its input, and the dimension of the channels in its output.
LAYERS = {
    "linear": (lambda: nn.Linear(3, 2), (3, 3), 1),
    "linear over tokens": (lambda: nn.Linear(3, 2, bias=False), (2, 3, 3), 2),
    "linear of one example": (lambda: nn.Linear(3, 2), (3,), 0),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3, padding=1, padding_mode="circular", groups=2), (2, 2, 4), 1),
    "conv2d": (lambda: nn.Conv2d(2, 2, 3, padding="same", padding_mode="reflect", bias=False), (2, 2, 3, 3), 1),
    "conv2d with stride": (lambda: nn.Conv2d(4, 2, 2, stride=2, padding=1, groups=2), (2, 4, 3, 3), 1),
    "conv2d of one example": (lambda: nn.Conv2d(2, 2, 2, padding=1, padding_mode="replicate"), (2, 2, 2), 0),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2, dilation=2, padding=1), (2, 1, 3, 3, 2), 1),
    "subclass": (lambda: Inheriting(2, 2, 2), (2, 2, 3, 3), 1),
    "transposed1d": (lambda: nn.ConvTranspose1d(2, 2, 3, stride=2, dilation=2, groups=2), (2, 2, 2), 1),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1, output_padding=1), (2, 4, 2, 2), 1),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 2, 2, bias=False), (2, 2, 1, 2, 2), 1),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch._dynamo.reset()


def made(name: str, estimator: str, **options) -> tuple[nn.Module, bnnify.BayesianModel, Tensor]:
    """A layer in float64, the layer converted, with σ that differ, and inputs of which all examples are alike."""
    build, shape, _ = LAYERS[name]
    layer = build().double()
    bnn = bnnify.convert(layer, estimator=estimator, **options)
    if "posterior_std" not in options:
        for parameter in bayesian_parameters(bnn.module):
            parameter.rho.data.normal_(0.0, 1.0)
    return layer, bnn, 0.3 * torch.rand(shape, dtype=torch.float64) + 0.5


def moments(bnn: bnnify.BayesianModel, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the flattened output over weights from the posterior, in closed form.

    The layers are linear in their parameters.
    """
    means = {p.attribute: p.mean.detach() for p in bayesian_parameters(bnn.module)}
    plain = bnnify.collapse(bnn)
    jacobians = jacrev(lambda values: functional_call(plain, values, (x,)).flatten())(means)
    covariance = sum(
        (jacobians[p.attribute].flatten(1) * std(p.rho).flatten().square()) @ jacobians[p.attribute].flatten(1).T
        for p in bayesian_parameters(bnn.module)
    )
    return plain(x).flatten(), covariance


@torch.no_grad()
def outputs(bnn: bnnify.BayesianModel, x: Tensor, count: int) -> Tensor:
    return torch.stack([bnn(x)[0].flatten() for _ in range(count)])


# The distribution of the output


@every_estimator
@every_layer
def test_mean_variance_and_covariance_of_the_output_are_those_documented(name, estimator):
    _, bnn, x = made(name, estimator)
    mean, covariance = moments(bnn, x)
    deviation = covariance.diagonal().sqrt()
    correlation = (covariance / deviation / deviation[:, None]).detach()
    channel = LAYERS[name][2]
    count = 1000
    found = outputs(bnn, x, count)
    standard = (found - mean) / deviation
    # Five standard errors; each output is Gaussian, and the square of one has variance 2.
    assert standard.mean(0).abs().max() < 5 / math.sqrt(count)
    assert (standard.square().mean(0) - 1).abs().max() < 5 * math.sqrt(2 / count)
    examples = len(x) if channel else 1
    example = torch.arange(examples).repeat_interleave(len(mean) // examples)
    same_example = (example == example[:, None]).double()
    expected = torch.eye(len(mean), dtype=torch.float64) if estimator == "local" else correlation * same_example
    # The product of two outputs that share |ΔW| has a variance of at most 3.
    assert (standard.T @ standard / count - expected).abs().max() < 5 * math.sqrt(3 / count)
    # The weight sample would have been found out: its outputs are correlated across examples.
    if channel:
        assert (correlation - expected).abs().max() > 10 * math.sqrt(3 / count)


def test_flipout_turns_one_weight_sample_by_signs_of_examples_and_channels():
    bnn = bnnify.convert(nn.Linear(1, 50, bias=False), estimator="flipout", posterior_std=1.0)
    noise = (bnn(torch.ones(40, 1))[0] - bnn.module(torch.ones(40, 1))).detach()
    torch.testing.assert_close(noise.abs(), noise.abs()[:1].expand(40, 50))
    signs = noise.sign() * noise.sign()[0]
    assert 0.4 < (signs[1:] > 0).double().mean() < 0.6
    # Not one sign for a whole example, nor one for a whole channel.
    assert 0 < (signs[1] > 0).sum() < 50
    assert 0 < (signs[1:, 1] > 0).sum() < 39


def test_flipout_has_signs_for_the_channels_of_the_input_too():
    bnn = bnnify.convert(nn.Linear(2, 1, bias=False), estimator="flipout", posterior_std=1.0)
    noise = (bnn(torch.ones(60, 2))[0] - bnn.module(torch.ones(60, 2))).detach().abs()
    assert noise.mul(1e4).round().unique().numel() == 2  # |ΔW₁ + ΔW₂| and |ΔW₁ - ΔW₂|


def test_the_signs_are_fair_and_independent():
    from bnnify.draws.estimators import _signs

    signs = torch.stack([_signs(torch.empty(3, 25, 2, 2), 1).flatten() for _ in range(4000)])
    assert signs.shape == (4000, 75)
    assert signs.unique().tolist() == [-1, 1]
    assert signs.mean(0).abs().max() < 5 / math.sqrt(4000)
    assert (signs.T @ signs / 4000 - torch.eye(75)).abs().max() < 5 / math.sqrt(4000)


@every_estimator
def test_as_sigma_vanishes_the_output_is_that_of_the_layer(estimator):
    for name in LAYERS:
        layer, bnn, x = made(name, estimator, posterior_std=1e-12)
        torch.testing.assert_close(bnn(x)[0], layer(x), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(bnn(input=x)[0], layer(x), rtol=1e-9, atol=1e-9)


@every_estimator
def test_output_size_is_respected(estimator):
    layer = nn.ConvTranspose2d(2, 3, 3, stride=2)
    bnn = bnnify.convert(layer, estimator=estimator, posterior_std=1e-9)
    x = torch.randn(2, 2, 4, 4)
    for size in ([9, 10], (2, 3, 10, 9)):
        torch.testing.assert_close(bnn(x, size)[0], layer(x, size))
        torch.testing.assert_close(bnn(x, output_size=size)[0], layer(x, output_size=size))


@every_estimator
def test_a_bias_may_be_deterministic_have_the_weight_sample_or_the_estimator(estimator):
    model, x = nn.Sequential(nn.Linear(3, 2)), torch.ones(50, 3)

    def noise(select: str | None, setting: object) -> Tensor:
        """With hardly any of it on the weight."""
        bnn = bnnify.convert(model, select=select, estimator=setting, posterior_std=1e-7)
        if select is None:
            bnn.module[0].bias_rho.data.fill_(0.5)
        return (bnn(x)[0] - model(x)).detach()

    assert noise("0.weight", estimator).abs().max() < 1e-5
    one_sample = noise(None, {"0.weight": estimator})
    assert one_sample[0].abs().min() > 1e-3
    torch.testing.assert_close(one_sample, one_sample[:1].expand(50, 2), rtol=1e-3, atol=1e-5)
    of_each_example = noise(None, estimator)
    assert (of_each_example.std(0) > 1e-3).all()


# Gradients


@every_estimator
@pytest.mark.parametrize("name", ["linear", "conv1d", "transposed2d"])
def test_the_gradient_is_unbiased(name, estimator):
    _, bnn, x = made(name, estimator)
    slope = torch.linspace(-1, 1, bnn.module(x).numel(), dtype=torch.float64)
    leaves = [tensor for p in bayesian_parameters(bnn.module) for tensor in (p.mean, p.rho)]

    def expected_loss() -> Tensor:
        """E[slope·y + y²/2] over the posterior."""
        total = 0.0
        plain, values = bnnify.collapse(bnn), {p.attribute: p.mean for p in bayesian_parameters(bnn.module)}
        mean = functional_call(plain, values, (x,)).flatten()
        for p in bayesian_parameters(bnn.module):
            jacobian = jacrev(lambda v: functional_call(plain, v, (x,)).flatten())(
                {k: v.detach() for k, v in values.items()}
            )
            total = total + (jacobian[p.attribute].flatten(1).square() @ std(p.rho).flatten().square()).sum() / 2
        return total + (slope * mean + mean.square() / 2).sum()

    expected = torch.cat([g.flatten() for g in torch.autograd.grad(expected_loss(), leaves)])
    found = []
    for _ in range(700):
        output = bnn(x)[0].flatten()
        gradients = torch.autograd.grad((slope * output + output.square() / 2).sum(), leaves)
        found.append(torch.cat([gradient.flatten() for gradient in gradients]))
    found = torch.stack(found)
    error = found.std(0) / math.sqrt(len(found))
    assert (error < 0.2 * expected.abs().max()).all()
    assert ((found.mean(0) - expected).abs() < 5 * error + 1e-12).all()


def test_both_have_a_gradient_of_less_variance_than_the_weight_sample():
    x, y = torch.randn(64, 10), torch.randn(64, 1)
    model = nn.Linear(10, 1)
    variances = {}
    for estimator in ("reparameterization", *ESTIMATORS):
        bnn = bnnify.convert(model, estimator=estimator, posterior_std=0.5)
        gradients = [torch.autograd.grad(F.mse_loss(bnn(x)[0], y), bnn.module.weight)[0].flatten() for _ in range(300)]
        variances[estimator] = torch.stack(gradients).var(0).sum()
    assert variances["local"] < 0.3 * variances["reparameterization"]
    assert variances["flipout"] < 0.3 * variances["reparameterization"]


@pytest.mark.parametrize("layer", [nn.Linear(3, 2, bias=False), nn.Conv1d(3, 2, 3, padding=1, bias=False)])
@every_estimator
def test_where_there_is_no_variance_the_output_is_exact_and_gradients_are_finite(layer, estimator):
    bnn = bnnify.convert(layer, estimator=estimator, posterior_std=0.3)
    x = torch.randn(2, 3) if isinstance(layer, nn.Linear) else torch.randn(2, 3, 5)
    x[0] = 0
    x.requires_grad_()
    output, _ = bnn(x)
    assert torch.equal(output[0], torch.zeros_like(output[0]))
    assert (output[1] != bnn.module(x)[1]).all()
    gradients = torch.autograd.grad(
        output.square().sum() + output.sum(), [x, *bnn.module.parameters()][:3], create_graph=True
    )
    assert all(gradient.isfinite().all() for gradient in gradients)
    sum(gradient.square().sum() for gradient in gradients).backward()
    assert x.grad.isfinite().all()


@every_estimator
def test_several_forwards_and_one_backward_give_the_mean_of_their_gradients(estimator):
    model, inputs = zoo.build("conv2d")
    bnn = bnnify.convert(model, estimator=estimator)
    rhos = [p.rho for p in bayesian_parameters(bnn.module)]

    def loss(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return zoo.loss(bnn(*inputs)[0])

    one_by_one = [torch.autograd.grad(loss(seed), rhos) for seed in range(3)]
    together = torch.autograd.grad(sum(loss(seed) for seed in range(3)) / 3, rhos)
    for index, gradient in enumerate(together):
        torch.testing.assert_close(gradient, sum(each[index] for each in one_by_one) / 3)


@pytest.mark.parametrize(
    ("prior", "estimator"),
    [
        (bnnify.Pretrained(), "reparameterization"),
        (bnnify.Laplace(), "reparameterization"),
        *((bnnify.Gaussian(std=0.3), estimator) for estimator in ESTIMATORS),
    ],
    ids=str,
)
@pytest.mark.parametrize("how", ["is_grads_batched", "vmap", "create_graph"])
def test_batched_gradients_are_those_of_single_rows(how, prior, estimator):
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(9, 2))
    bnn = bnnify.convert(model, estimator=estimator, prior=prior)
    output, kl = bnn(torch.randn(2, 2, 5))
    leaves = [each for p in bayesian_parameters(bnn.module) for each in (p.mean, p.rho)]
    rows = torch.eye(4).view(4, 2, 2)

    def gradients(rows: Tensor, **options) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output + kl, leaves, rows, retain_graph=True, **options)

    expected = [torch.stack(each) for each in zip(*map(gradients, rows), strict=True)]
    batched = {"is_grads_batched": True, "create_graph": how == "create_graph"}
    found = vmap(gradients)(rows) if how == "vmap" else gradients(rows, **batched)
    torch.testing.assert_close(list(found), expected)


@every_estimator
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_a_nested_input_is_refused_with_the_estimator_that_takes_it(layout, estimator):
    x = torch.nested.nested_tensor([torch.randn(2, 5), torch.randn(3, 5)], layout=layout)
    with pytest.raises(bnnify.DrawError, match=f"Linear with estimator='{estimator}'.*'reparameterization'"):
        bnnify.convert(nn.Linear(5, 3), estimator=estimator)(x)
    output, _ = bnnify.convert(nn.Linear(5, 3))(x)
    assert [part.shape for part in output.unbind()] == [(2, 3), (3, 3)]


# Where the weight sample is used


def of_one_network(output: Tensor) -> bool:
    """Whether equal examples got equal outputs."""
    return torch.allclose(output, output[:1].expand_as(output), rtol=1e-4, atol=1e-5)


SAME = torch.ones(6, 5)


@every_estimator
def test_draw_sample_and_predict_use_one_network(estimator):
    bnn = bnnify.convert(nn.Sequential(nn.Linear(5, 5), nn.Tanh()), estimator=estimator, posterior_std=0.5)
    assert not of_one_network(bnn(SAME)[0])
    with bnn.draw():
        layer = bnn.module[0]
        output = bnn(SAME)[0]
        assert torch.equal(output, torch.tanh(F.linear(SAME, layer.weight, layer.bias)))
        assert torch.equal(output, bnn.module(SAME))
        assert layer.weight is not layer._parameters["weight"]
    assert of_one_network(output)
    assert of_one_network(bnn.sample(SAME, num_samples=1)[0])
    assert of_one_network(bnn.predict(SAME, num_samples=3).mean)
    assert not of_one_network(bnn(SAME)[0])


class Reading(nn.Module):
    """The parent reads the weight of a child, twice, and calls another child."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.called(x)
        self.weights = self.read.weight, self.read.weight
        return F.linear(F.linear(x, self.weights[0], self.read.bias), self.weights[1])


@every_estimator
def test_who_reads_the_weight_gets_the_sample_of_the_draw(estimator):
    bnn = bnnify.convert(Reading(), estimator=estimator)
    seen = []
    for _ in range(2):
        output, _ = bnn(SAME)
        first, second = bnn.module.weights
        assert torch.equal(first, second)
        assert not torch.equal(first, bnn.module.read._parameters["weight"])
        seen.append(first)
        output.sum().backward()
        assert bnn.module.read.weight_rho.grad.isfinite().all()
        assert (bnn.module.read.weight_rho.grad != 0).any()
    assert not torch.equal(*seen)


def test_the_sample_that_is_read_has_the_distribution_of_the_posterior():
    for estimator in ESTIMATORS:
        bnn = bnnify.convert(Reading(), estimator=estimator)
        bnn.module.read.weight_rho.data.normal_()
        weights = []
        for _ in range(1000):
            bnn(SAME)
            weights.append(bnn.module.weights[0].detach().flatten())
        layer = bnn.module.read
        standard = (torch.stack(weights) - layer.weight.flatten()) / std(layer.weight_rho).flatten()
        assert standard.mean(0).abs().max() < 5 / math.sqrt(1000)
        assert (standard.var(0) - 1).abs().max() < 5 * math.sqrt(2 / 1000)
        assert (torch.corrcoef(standard.T) - torch.eye(25)).abs().max() < 5 / math.sqrt(1000)


class Regions(nn.Module):
    """Several regions, of which each layer is called once or, on request, the last one twice."""

    def __init__(self, use_reentrant: bool | None = None, calls: int = 1) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.run, self.calls = zoo.Region(use_reentrant), calls
        self.first, self.layer = nn.Conv1d(2, 5, 3, padding=1), nn.Linear(5, 5)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv1d(5, 5, 3, padding=1), nn.Tanh(), nn.Dropout(0.3), nn.Conv1d(5, 5, 1))
            for _ in range(2)
        )

    def use(self, x: Tensor) -> Tensor:
        for _ in range(self.calls):
            x = x + self.layer(x)
        return x + F.linear(x, self.layer.weight, self.layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        for block in self.blocks:
            x = x + self.run(block, x)
        return self.run(self.use, x.mT)


DATA = torch.linspace(-1, 1, 24).reshape(3, 2, 4)


@every_estimator
@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_a_layer_that_is_called_twice_in_a_forward_is_refused_with_what_to_do(use_reentrant, estimator):
    bnn = bnnify.convert(Regions(use_reentrant, calls=2), estimator=estimator)
    for _ in range(2):
        with pytest.raises(bnnify.DrawError, match=r"`layer.weight` .*called twice.*estimator='reparameterization'"):
            bnn(DATA)
    for fullgraph in (True, False) if use_reentrant is None else ():
        torch._dynamo.reset()
        with pytest.raises(RuntimeError, match="called twice"):
            torch.compile(bnn, fullgraph=fullgraph, backend="eager")(DATA)
    sampled = bnnify.convert(bnnify.collapse(bnn), estimator={"layer": "reparameterization", "*": estimator})
    sampled(DATA)[0].sum().backward()


# Activation checkpointing


@every_estimator
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_gradients_of_no_checkpointing(use_reentrant, estimator):
    def gradients(use_reentrant: bool | None) -> list[Tensor]:
        bnn = bnnify.convert(Regions(use_reentrant), estimator=estimator)
        losses = []
        for seed in range(3):
            torch.manual_seed(seed)
            output, kl = bnn(DATA)
            losses.append((seed + 1) * output.square().sum() + kl)
        torch.stack(losses).sum().backward()
        return [p.grad for p in bnn.parameters() if p.requires_grad]

    expected, found = gradients(None), gradients(use_reentrant)
    assert all((gradient != 0).any() for gradient in expected)
    torch.testing.assert_close(found, expected)


@every_estimator
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_the_whole_bayesian_model_may_stand_inside_a_checkpoint(use_reentrant, estimator):
    def gradient(checkpointed: bool) -> Tensor:
        torch.manual_seed(1)
        bnn = bnnify.convert(Regions(), estimator=estimator)
        x = DATA.clone().requires_grad_()

        def run(x: Tensor) -> Tensor:
            return bnn(x)[0]

        output = checkpoint(run, x, use_reentrant=use_reentrant) if checkpointed else run(x)
        output.square().sum().backward()
        return bnn.module.layer.weight_rho.grad

    torch.testing.assert_close(gradient(True), gradient(False))


# torch.compile, torch.func, torch.export, autocast


@every_estimator
def test_equal_blocks_compile_to_one_graph_for_all_draws(estimator):
    bnn = bnnify.convert(nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)), estimator=estimator, posterior_std=0.5)
    counter = CompileCounterWithBackend("aot_eager")
    for block in bnn.module:
        block.compile(fullgraph=True, backend=counter)
    x = SAME.clone().requires_grad_()
    found = [bnn(x)[0] for _ in range(3)]
    assert counter.frame_count == 1
    assert not torch.allclose(found[1], found[2])
    assert not of_one_network(found[2])


@every_estimator
def test_compiles_with_checkpointed_regions(estimator):
    model, inputs = zoo.build("checkpointed")
    bnn = bnnify.convert(model, estimator=estimator)
    compiled = torch.compile(bnn, fullgraph=True, backend="aot_eager")
    # Noting that a layer was called is a side effect, which the compiler has to be allowed in such a region.
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        output = torch.stack([compiled(*inputs)[0] for _ in range(2)])
    output.square().sum().backward()
    assert all((p.rho.grad != 0).any() and p.rho.grad.isfinite().all() for p in bayesian_parameters(bnn.module))


@every_estimator
def test_vmap_and_export(estimator):
    bnn = bnnify.convert(nn.Sequential(nn.Linear(5, 5), nn.Tanh()), estimator=estimator, posterior_std=0.5)
    different = vmap(lambda x: bnn(x)[0], randomness="different")(SAME)
    assert not of_one_network(different)
    assert of_one_network(vmap(lambda x: bnn(x)[0], randomness="same")(SAME))
    run = torch.export.export(bnn, (SAME,)).module()
    assert not of_one_network(run(SAME)[0])
    assert not torch.allclose(run(SAME)[0], run(SAME)[0])


@every_estimator
@pytest.mark.parametrize("how", ["bfloat16", "float16", "half model"])
def test_under_autocast_and_in_half_precision_small_variances_are_kept(how, estimator):
    dtype = torch.float16 if how == "half model" else getattr(torch, how)
    layer, x = nn.Linear(64, 500), torch.ones(40, 64)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    if how == "half model":
        layer, x = layer.half(), x.half()
    bnn = bnnify.convert(layer, estimator=estimator, posterior_std=1e-4)
    with torch.autocast("cpu", dtype=dtype, enabled=how != "half model"):
        output, _ = bnn(x)
    assert output.dtype == dtype
    # σ² = 1e-8 is zero in float16. Five hundred outputs are independent, whatever the examples are.
    torch.testing.assert_close(output.double().square().mean().sqrt().item(), 1e-4 * math.sqrt(65), rtol=0.16, atol=0)
    (100 * output.float()).square().sum().backward()
    assert bnn.module.weight_rho.grad.isfinite().all()
    assert (bnn.module.weight_rho.grad != 0).any()


# Conversion


MIXED = ["transposed", "encoder", "tied_by_reading", "used_twice", "dict", "checkpointed", "checkpointed_reentrant"]


@every_estimator
@pytest.mark.parametrize("name", MIXED)
def test_models_whose_layers_have_it_in_part_convert_and_train(name, estimator):
    settings = {"estimator": estimator}
    assert not broken(Case(name, lambda: zoo.build(name)[0], lambda model: (zoo.build(name)[1], {}), settings=settings))
    model, inputs = zoo.build(name)
    bnn = bnnify.convert(model, estimator=estimator, posterior_std=0.1)
    sum(zoo.loss(bnn(*inputs)[0]) for _ in range(3)).backward()
    for parameter in bayesian_parameters(bnn.module):
        assert all(leaf.grad.isfinite().all() and leaf.grad.any() for leaf in (parameter.mean, parameter.rho))
    for training in (True, False):
        bnn.train(training)
        with torch.set_grad_enabled(training):
            assert not zoo.equal(bnn(*inputs)[0], bnn(*inputs)[0])
    plain = bnnify.convert(model, posterior_std=0.1)
    assert torch.equal(bnn.kl(), plain.kl())
    assert torch.equal(bnn(*inputs)[1], plain.kl())
    for parameter in bayesian_parameters(bnn.module):
        assert parameter.active.entry is None


@every_estimator
def test_report_and_repr_name_the_estimator(estimator):
    bnn = bnnify.convert(nn.Sequential(nn.Linear(3, 2)), estimator=estimator)
    assert all(entry.settings.startswith(f"{estimator}, prior=") for entry in bnn.report.bayesian)
    assert f"Bayesian: {estimator}, " in str(bnn.report)
    assert f"weight: {estimator}, " in repr(bnn)


@every_estimator
def test_files_pickles_and_copies_keep_the_estimator(estimator, tmp_path):
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    bnn = bnnify.convert(model, estimator={"0": estimator}, posterior_std=0.5)
    bnnify.save(bnn, tmp_path / "file")
    file = io.BytesIO()
    torch.save(bnn, file)
    file.seek(0)
    with bnn.draw():
        inside = copy.deepcopy(bnn)
    others = [
        bnnify.load(tmp_path / "file", copy.deepcopy(model)),
        pickle.loads(pickle.dumps(bnn)),
        torch.load(file, weights_only=False),
        copy.deepcopy(bnn),
        inside,
    ]
    torch.manual_seed(1)
    expected, _ = bnn(SAME)
    for other in others:
        torch.manual_seed(1)
        assert torch.equal(other(SAME)[0], expected)
        assert type(other.module[0]) is type(bnn.module[0])
    assert type(bnnify.collapse(others[1]).get_submodule("0")) is nn.Linear
    assert bnn.module[2]._bayesian["weight"].settings.estimator == "reparameterization"


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, 2 * weight, bias)


def replaced_forward() -> nn.Module:
    layer = nn.Linear(5, 5)
    layer.forward = lambda x: F.linear(x, 2 * layer.weight)
    return layer


FALL_BACK = {
    "recurrent": (lambda: nn.LSTM(5, 5), "weight_ih_l0", "not LSTM"),
    "attention": (lambda: nn.MultiheadAttention(4, 2), "in_proj_weight", "not MultiheadAttention"),
    "projection of attention": (
        lambda: nn.MultiheadAttention(4, 2),
        "out_proj.weight",
        "not NonDynamicallyQuantizableLinear",
    ),
    "own forward": (lambda: zoo.ScaledLinear(5, 5), "weight", "not ScaledLinear"),
    "own part of forward": (lambda: OwnConvForward(2, 2, 3), "weight", "not OwnConvForward"),
    "forward of the object": (replaced_forward, "weight", "torch's own forward"),
    "tied": (zoo.TiedLanguageModel, "embed.weight", "it is tied"),
    "two names": (zoo.UsedTwice, "layer.weight", "several names"),
    "parametrized": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(5, 5)),
        "parametrizations.weight.original1",
        "not ParametrizationList",
    ),
    "bias of those": (zoo.UsedTwice, "layer.bias", "several names"),
}


@pytest.mark.parametrize("case", FALL_BACK)
def test_what_cannot_have_the_estimator_gets_the_weight_sample_and_the_report_says_why(case):
    build, name, reason = FALL_BACK[case]
    estimator = "flipout"
    bnn = bnnify.convert(nn.ModuleDict({"rest": nn.Linear(5, 5), "part": build()}), estimator=estimator)
    entry = next(entry for entry in bnn.report.bayesian if entry.name == f"part.{name}")
    assert entry.settings.startswith(f"reparameterization (not {estimator}: ")
    assert reason in entry.settings
    assert reason in str(bnn.report)
    rest = next(entry for entry in bnn.report.bayesian if entry.name == "rest.weight")
    assert rest.settings.startswith(f"{estimator}, ")


@pytest.mark.parametrize("case", FALL_BACK)
def test_naming_what_cannot_have_the_estimator_is_an_error(case):
    build, name, reason = FALL_BACK[case]
    estimator = "local"
    model = nn.ModuleDict({"rest": nn.Linear(5, 5), "part": build()})
    with pytest.raises(bnnify.ConversionError) as raised:
        bnnify.convert(model, estimator={f"part.{name}": estimator})
    for part in (f"'part.{name}': '{estimator}'", f"`part.{name}`", reason, "'reparameterization'"):
        assert part in str(raised.value)


def test_a_pattern_that_helps_some_of_its_parameters_holds_for_those():
    model = nn.Sequential(nn.LSTM(5, 5), nn.Linear(5, 5))
    bnn = bnnify.convert(model, estimator={"*": "flipout"})
    assert "not flipout" in bnn.report.bayesian[0].settings
    assert bnn.module[1]._bayesian["bias"].settings.estimator == "flipout"
    with pytest.raises(bnnify.ConversionError, match="whose `weight` has it"):
        bnnify.convert(model, estimator={"1.bias": "flipout"})


def test_the_bias_of_a_layer_whose_weight_is_bayesian_already_goes_with_that():
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    bnn = bnnify.convert(model, select="0.weight", inplace=True)
    bnn = bnnify.convert(bnn, estimator={"0.bias": "reparameterization", "1": "local"}, inplace=True)
    assert bnn.module[0]._bayesian["weight"].settings.estimator == "reparameterization"
    assert bnn.module[0]._bayesian["bias"].settings.estimator == "reparameterization"
    assert bnn.module[1]._bayesian["weight"].settings.estimator == "local"
    bnn(SAME)


@pytest.mark.parametrize("estimator", ["local", "flipout"])
def test_a_monte_carlo_kl_is_taken_from_the_weights_that_the_forward_used(estimator):
    prior = bnnify.ScaleMixture()
    bnn = bnnify.convert(nn.Linear(1, 1, bias=False), prior=prior, posterior_std=0.2, estimator=estimator)
    output, kl = bnn(torch.ones(1, 1))
    entropy = torch.distributions.Normal(0.0, 0.2).entropy()
    torch.testing.assert_close(kl, (-entropy - prior.log_prob(output)).sum())


# The noise that the local reparameterization adds


def test_gradients_of_the_added_noise_are_those_of_finite_differences_to_second_order():
    output, variance, noise = torch.randn(4, 3), torch.rand(4, 3) + 0.1, torch.randn(4, 3)
    arguments = [each.double() for each in (output, variance, noise)]
    for each in arguments[:2]:
        each.requires_grad_()
    assert torch.autograd.gradcheck(_AddNoise.apply, arguments)
    assert torch.autograd.gradgradcheck(_AddNoise.apply, arguments)


def test_where_there_is_no_variance_the_added_noise_has_no_gradient():
    output, noise = torch.randn(3, requires_grad=True), torch.randn(3)
    variance = torch.tensor([0.0, -1e-9, 1.0], requires_grad=True)
    found = _AddNoise.apply(output, variance, noise)
    assert torch.equal(found[:2], output[:2])
    for create_graph in (False, True):
        (grad,) = torch.autograd.grad(found.sum(), variance, create_graph=create_graph, retain_graph=True)
        torch.testing.assert_close(grad.detach(), torch.tensor([0.0, 0.0, 0.5 * noise[2]]))
    (second,) = torch.autograd.grad(grad.sum(), variance)
    assert second.isfinite().all()


def test_a_class_that_has_got_a_forward_of_its_own_since_is_refused_with_what_to_do():
    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    with pytest.raises(bnnify.DrawError, match=r"Doubled was converted.*estimator='reparameterization'"):
        bayesian_class(Doubled, ("weight", "bias"), estimated=True)
