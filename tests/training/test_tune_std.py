"""tune_std finds the best factor on σ, whatever σ was before, and touches nothing else."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical, Normal
from torch.utils.data import DataLoader, TensorDataset

import bnnify
from bnnify import tune_std
from bnnify.distributions.gaussian import std
from bnnify.modules.parameters import unique_bayesian_parameters
from tests import zoo


def overconfident():
    """A classifier that is far surer than its data allow, and held-out data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3))
    x = torch.randn(300, 2)
    with torch.no_grad():
        labels = Categorical(logits=3 * model(x)).sample()
        model[2].weight *= 12
        model[2].bias *= 12
    return model, DataLoader(TensorDataset(x, labels), 100)


def stds(bnn):
    return {parameter.name: std(parameter.rho.detach().float()) for parameter in unique_bayesian_parameters(bnn.module)}


def averaged(bnn, batches, num_samples=8):
    """The mean probabilities under the random numbers that tune_std uses: each network is drawn once, for all data."""
    bnn.eval()
    batches = list(batches)  # before the seed, because iterating over a DataLoader takes a random number
    outputs = []
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(num_samples):
            with bnn.draw():
                outputs.append(torch.cat([bnn.module(x).double().softmax(-1) for x, _ in batches]))
    return torch.stack(outputs).mean(0)


def nll(bnn, data, num_samples=8):
    """The predictive NLL, computed on its own."""
    return F.nll_loss(averaged(bnn, data, num_samples).log(), data.dataset.tensors[1]).item()


def with_std(bnn, factor, names=""):
    scaled = copy.deepcopy(bnn)
    for parameter in unique_bayesian_parameters(scaled.module):
        if parameter.name.startswith(names):
            sigma = std(parameter.rho.detach().double()) * factor
            parameter.rho.data.copy_(sigma.expm1().log())
    return scaled


def test_it_finds_the_factor_that_a_fine_grid_finds():
    model, data = overconfident()
    bnn = bnnify.convert(model, posterior_std=bnnify.Relative(0.2, full_width=32))
    grid = [math.exp(step / 20) for step in range(-40, 60, 2)]
    values = {factor: nll(with_std(bnn, factor), data) for factor in grid}
    best = min(values, key=values.__getitem__)
    before = stds(bnn)
    tuned = tune_std(bnn, data, likelihood="logits")
    found = tuned.factor
    assert tuned.after == pytest.approx(nll(bnn, data), abs=1e-5)
    assert tuned.before == pytest.approx(nll(with_std(bnn, 1 / found), data), abs=1e-5)
    assert abs(math.log(found / best)) < 0.2
    assert nll(bnn, data) < values[best] + 1e-3
    assert nll(bnn, data) < min(values[grid[0]], values[grid[-1]]) - 0.05  # the optimum is inside, and matters
    for name, sigma in stds(bnn).items():
        torch.testing.assert_close(sigma, found * before[name], rtol=1e-4, atol=0)


def test_it_is_better_than_the_plain_network():
    model, data = overconfident()
    bnn = bnnify.convert(model)
    tune_std(bnn, data, likelihood="logits")
    x, y = data.dataset.tensors
    assert nll(bnn, data) < F.cross_entropy(model(x), y).item() - 0.02


@pytest.mark.parametrize("times", [10.0, 0.02])
def test_it_does_not_matter_where_it_starts(times):
    model, data = overconfident()
    bnn = bnnify.convert(model)
    other = with_std(bnn, times)
    first, second = (tune_std(each, data, likelihood="logits").factor for each in (bnn, other))
    assert second == pytest.approx(first / times, rel=1e-3)
    for name, sigma in stds(bnn).items():
        torch.testing.assert_close(stds(other)[name], sigma, rtol=1e-3, atol=0)


def test_a_loader_that_shuffles_gives_every_factor_the_same_batches():
    _, data = overconfident()
    shuffling = DataLoader(data.dataset, 50, shuffle=True)

    class Shows(nn.Linear):
        def forward(self, x):
            seen.append(x)
            return super().forward(x)

    seen = []
    tune_std(bnnify.convert(Shows(2, 3)), shuffling, num_samples=1, likelihood="logits")
    assert len(seen) > 12
    assert all(torch.equal(first, later) for first, later in zip(seen[:6], seen[6:12], strict=True))


def test_a_linear_regression_gets_the_std_that_its_residuals_ask_for():
    # y = w·x with w ~ N(1, 0.6²) for each datum: more data and more draws would find 0.6 exactly.
    x = torch.full((1000, 1), 3.0)
    y = (1 + 0.6 * torch.randn(1000, 1)) * x + 0.5 * torch.randn(1000, 1)
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    bnn = bnnify.convert(model, posterior_std=5.0)
    tune_std(bnn, [(x, y)], num_samples=100, likelihood=lambda mean: Normal(mean, 0.5))
    assert stds(bnn)["weight"].item() == pytest.approx(0.6, rel=0.15)


def test_everything_but_rho_and_the_scale_of_the_prior_is_as_before():
    model, data = overconfident()
    bnn = bnnify.convert(nn.Sequential(*model, nn.BatchNorm1d(3), nn.Dropout(0.5)))
    bnn.train()
    bnn.module[3].eval()
    flags = [module.training for module in bnn.modules()]
    before = {key: value.clone() for key, value in bnn.module.state_dict().items()}
    rhos = {id(parameter.rho) for parameter in unique_bayesian_parameters(bnn.module)}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    tune_std(bnn, data, num_samples=2, likelihood="logits")
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in bnn.modules()] == flags
    assert {id(parameter.rho) for parameter in unique_bayesian_parameters(bnn.module)} == rhos
    assert all(parameter.grad is None for parameter in bnn.parameters())
    for key, value in bnn.module.state_dict().items():
        assert torch.equal(value, before[key]) != key.endswith(("_rho", "_initial_std")), key


def test_the_random_numbers_of_the_program_have_no_say_but_the_seed_has():
    model, data = overconfident()
    found = []
    for program, seed in (1, 0), (2, 0), (1, 7):
        torch.manual_seed(program)
        found.append(tune_std(bnnify.convert(model), data, num_samples=2, seed=seed, likelihood="logits").after)
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(("per_layer", "calls"), [(False, 1), (False, 40), (True, 105)])
def test_if_it_fails_midway_nothing_has_changed(per_layer, calls):
    model, data = overconfident()
    bnn = bnnify.convert(model).train()
    before = {key: value.clone() for key, value in bnn.module.state_dict().items()}
    state, left = torch.get_rng_state(), [calls]

    def fails(output):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return Categorical(logits=output)

    with pytest.raises(KeyboardInterrupt):
        tune_std(bnn, data, num_samples=2, likelihood=fails, per_layer=per_layer)
    assert bnn.module.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in bnn.module.state_dict().items())


class Heads(nn.Module):
    """Two regressions side by side."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.a.weight)
        nn.init.ones_(self.b.weight)

    def forward(self, x):
        return torch.cat([self.a(x), self.b(x)], 1)


def test_per_layer_gives_each_layer_what_its_data_ask_for():
    x = torch.full((400, 1), 3.0)
    y = (1 + torch.tensor([0.8, 0.1]) * torch.randn(400, 2)) * x + 0.3 * torch.randn(400, 2)
    options = {"num_samples": 50, "likelihood": lambda mean: Normal(mean, 0.3)}
    bnn = bnnify.convert(Heads(), posterior_std={"a.*": 0.5, "b.*": 2.0})
    tuned = tune_std(bnn, [(x, y)], per_layer=True, **options)
    common, factors = tuned.factor, tuned.factors
    assert list(factors) == ["a", "b"]
    for name, expected, start in ("a", 0.8, 0.5), ("b", 0.1, 2.0):
        found = stds(bnn)[f"{name}.weight"].item()
        assert found == pytest.approx(factors[name] * start, rel=1e-4)
        assert abs(math.log2(found / expected)) < 0.8  # steps are factors of two
        assert math.log2(factors[name] / common) == pytest.approx(round(math.log2(factors[name] / common)), abs=1e-6)


@pytest.mark.parametrize("times", [0.05, 20.0])
def test_per_layer_is_never_worse_on_the_tuning_data(times):
    model, data = overconfident()
    together = with_std(bnnify.convert(model), times, names="2.")
    apart = copy.deepcopy(together)
    tune_std(together, data, num_samples=4, likelihood="logits")
    tune_std(apart, data, num_samples=4, per_layer=True, likelihood="logits")
    assert nll(apart, data, 4) <= nll(together, data, 4)


def test_per_layer_leaves_the_common_factor_where_nothing_is_gained():
    data = [(torch.zeros(4, 2), torch.tensor([0, 1, 2, 0]))]
    bnn = bnnify.convert(nn.Sequential(nn.Linear(2, 4, bias=False), nn.Linear(4, 3, bias=False)))
    # Inputs of zero: no σ makes any difference.
    factors = tune_std(bnn, data, num_samples=2, per_layer=True, likelihood="logits").factors
    assert factors["0"] == factors["1"]


def test_what_is_pruned_stays_pruned():
    model, data = overconfident()
    bnn = bnnify.convert(model)
    bnnify.prune(bnn, 0.5)
    before = {parameter.name: parameter.rho.detach().clone() for parameter in unique_bayesian_parameters(bnn.module)}
    factor = tune_std(bnn, data, num_samples=2, likelihood="logits").factor
    for parameter in unique_bayesian_parameters(bnn.module):
        old, new = before[parameter.name], parameter.rho
        pruned = std(old) == 0
        assert torch.equal(new[pruned], old[pruned])
        torch.testing.assert_close(std(new)[~pruned], factor * std(old)[~pruned], rtol=1e-4, atol=0)
        assert pruned.any() or parameter.name.endswith("bias")


def test_points_have_no_std_to_tune():
    model, data = overconfident()
    bnn = bnnify.convert(model, prior=bnnify.Gaussian(), posterior={"0": bnnify.Point()})
    assert list(tune_std(bnn, data, num_samples=2, per_layer=True, likelihood="logits").factors) == ["2"]
    with pytest.raises(ValueError, match="no parameter of the model has a σ"):
        tune_std(bnnify.convert(model, prior=bnnify.Gaussian(), posterior=bnnify.Point()), data, likelihood="logits")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model, data = overconfident()
    reference = bnnify.convert(copy.deepcopy(model))
    bnn = bnnify.convert(model.to(dtype))
    before = stds(bnn)
    batches = [(x.to(dtype), y) for x, y in DataLoader(data.dataset, 100)]
    factor = tune_std(bnn, batches, likelihood="logits").factor
    assert bnn.module[0].weight_rho.dtype == torch.promote_types(dtype, torch.float32)
    # Under other random numbers.
    assert factor == pytest.approx(tune_std(reference, data, likelihood="logits").factor, rel=0.5)
    for name, sigma in stds(bnn).items():
        torch.testing.assert_close(sigma, factor * before[name], rtol=0.03, atol=0)


def test_a_tied_parameter_is_multiplied_once():
    bnn = bnnify.convert(zoo.TiedLanguageModel())
    before = stds(bnn)
    data = [(torch.randint(0, 11, (4, 5)), torch.randint(0, 11, (4, 5)))]
    factor = tune_std(bnn, data, num_samples=2, likelihood="logits").factor
    assert bnn.module.head.weight_rho is bnn.module.embed.weight_rho
    for name, sigma in stds(bnn).items():
        torch.testing.assert_close(sigma, factor * before[name], rtol=1e-4, atol=0)


def test_structures_of_inputs_and_outputs():
    x, y = torch.randn(20, 4), torch.randint(2, (20,))
    results = [
        tune_std(bnnify.convert(model), batches, num_samples=2, output=output, likelihood="logits").factor
        for model in [zoo.ReturnsDict()]
        for batches, output in (
            ([(x, y)], "a"),
            ([[{"x": x}, y]], lambda found: found["a"]),
            ([((x[:10],), y[:10]), ((x[10:],), y[10:])], "a"),
        )
    ]
    assert results == pytest.approx([results[0]] * 3)


def test_predicted_noise():
    x = torch.randn(50, 1)
    bnn = bnnify.convert(nn.Linear(1, 2))
    pair = {"likelihood": "gaussian", "output": lambda out: (out[:, 0], out[:, 1].exp())}
    assert tune_std(bnn, [(x, x.squeeze())], num_samples=2, **pair).factor > 0


def test_it_says_what_it_needs():
    bnn = bnnify.convert(nn.Linear(2, 3))
    x, y = torch.randn(4, 2), torch.tensor([0, 1, 2, 0])
    with pytest.raises(ValueError, match=r"batches \(input, target\).* gave a Tensor"):
        tune_std(bnn, [x], likelihood="logits")
    with pytest.raises(ValueError, match="without batches"):
        tune_std(bnn, [], likelihood="logits")
    with pytest.raises(ValueError, match="num_samples"):
        tune_std(bnn, [(x, y)], num_samples=0, likelihood="logits")
    with pytest.raises(ValueError, match="likelihood='values' does not tell how probable"):
        tune_std(bnn, [(x, y)], likelihood="values")
    with pytest.raises(ValueError, match="under no factor"):
        tune_std(bnn, [(x, y)], likelihood=lambda out: Categorical(logits=out * torch.nan, validate_args=False))
