"""ResponseStd on every kind of model, and on those that are not functions of their input."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import bnnify
from bnnify import ResponseStd
from bnnify.distributions.gaussian import std
from bnnify.modules.known_forwards import known_forward
from bnnify.modules.parameters import unique_bayesian_parameters
from tests import zoo

FRACTION = 0.1

SELECT = ["inner.*", "out"]


def sigmas(bnn):
    return {parameter.name: std(parameter.rho.detach()) for parameter in unique_bayesian_parameters(bnn.module)}


def state_of(model):
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return tensors, [(type(module), module.training, dict(module._forward_hooks)) for module in model.modules()]


def calls_of_linear_layers(model, inputs):
    """The layers whose output is linear in their weight, by name, if they are called once, with what they are given."""
    calls = {}
    handles = [
        module.register_forward_hook(
            lambda module, args, output, name=name: calls.setdefault(name, []).append((module, args))
        )
        for name, module in model.named_modules()
        if known_forward(type(module)) and "forward" not in vars(module)
    ]
    with torch.no_grad():
        model(*copy.deepcopy(inputs))
    for handle in handles:
        handle.remove()
    return {name: found[0] for name, found in calls.items() if len(found) == 1}


@pytest.mark.parametrize("name", zoo.ZOO)
def test_every_model_gets_a_positive_sigma_and_the_noise_at_its_linear_layers_is_the_fraction(name):
    model, inputs = zoo.build(name)
    model.eval()
    before, (tensors, modules) = model.state_dict(), state_of(model)
    bnn = bnnify.convert(model, posterior_std=ResponseStd(inputs, FRACTION))
    assert state_of(model)[1] == modules
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in before.items())
    found = sigmas(bnn)
    assert all(sigma.isfinite().all() and (sigma > 0).all() for sigma in found.values())
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    tied = len(names) > len(list(model.parameters()))
    for path, (layer, args) in ({} if tied else calls_of_linear_layers(model, inputs)).items():
        channel = known_forward(type(layer)).channel
        own = {
            key: found[f"{path}.{key}".lstrip(".")]
            for key, _ in layer.named_parameters(recurse=False)
            if f"{path}.{key}".lstrip(".") in found
        }
        if not own:
            continue
        double = copy.deepcopy(layer).double()
        exact = [double(*[arg.double() for arg in args])]
        torch.manual_seed(0)
        for _ in range(400):
            values = {
                key: double.get_parameter(key) + sigma.double() * torch.randn(sigma.shape, dtype=torch.float64)
                for key, sigma in own.items()
            }
            exact.append(functional_call(double, values, tuple(arg.double() for arg in args)))
        noise = (torch.stack(exact[1:]) - exact[0]).detach().square().mean().sqrt()
        rows = exact[0].detach().movedim(channel, -1).flatten(0, -2)
        signal = rows.var(0, correction=0).mean().sqrt()
        assert noise / signal == pytest.approx(FRACTION, rel=0.1), path


class Called(nn.Module):
    """A module with weights of its own, and an output layer."""

    def __init__(self, inner):
        super().__init__()
        torch.manual_seed(0)
        self.inner = inner()
        self.out = nn.Linear(6, 2)

    def forward(self, x):
        return self.out(self.inner(x))


class Reads(nn.Module):
    """Reads a weight instead of calling a layer, so that noise has to be tried on it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        return torch.softmax(x @ self.weight @ x.mT, -1) @ x


class KeepsList(Reads):
    """Attends to all that it was ever given."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.seen.append(x)
        self.calls += 1
        keys = torch.cat(self.seen, 1)
        return torch.softmax(x @ self.weight @ keys.mT, -1) @ keys


class Cache:
    keys = None


class TakesCache(Reads):
    def forward(self, x, cache=None):
        keys = x @ self.weight
        if cache is not None:
            cache.keys = keys = keys if cache.keys is None else torch.cat([cache.keys, keys], 1)
        return torch.softmax(x @ keys.mT, -1) @ keys


class GivesCache(Called):
    def forward(self, x):
        return self.out(self.inner(x, cache=Cache()))


class ChangesInput(Reads):
    def forward(self, x):
        return super().forward(x.mul_(2.0))


class ChangesCopy(Reads):
    def forward(self, x):
        return super().forward(2.0 * x)


def scaled_input(scale):
    model = Called(lambda: nn.LSTM(6, 6, batch_first=True))
    model.inner.register_forward_pre_hook(lambda module, args: (scale * args[0],))
    model.inner.register_forward_hook(lambda module, args, output: output[0])
    return model


X = torch.randn(24, 5, 6, generator=torch.Generator().manual_seed(1))
ALIKE = {
    "hooks that change the input": (lambda: scaled_input(3.0), lambda: scaled_input(1.0), X, 3 * X),
    "a list that grows": (lambda: Called(KeepsList), lambda: Called(Reads), X, X),
    "a cache that grows": (lambda: GivesCache(TakesCache), lambda: Called(TakesCache), X, X),
    "input changed in place": (lambda: Called(ChangesInput), lambda: Called(ChangesCopy), X, X),
}


@pytest.mark.parametrize("case", ALIKE)
def test_a_trial_runs_under_what_its_module_was_called_with(case):
    odd, plain, x, same_x = ALIKE[case]
    given = x.clone()
    found, expected = (
        sigmas(bnnify.convert(make(), select=SELECT, posterior_std=ResponseStd(iter([data[:12], data[12:]]))))
        for make, data in ((odd, given), (plain, same_x))
    )
    for name, sigma in expected.items():
        torch.testing.assert_close(found[name], sigma)
    assert torch.equal(given, x)


def test_the_state_of_a_model_that_is_converted_in_place_stays():
    model = Called(KeepsList)
    random = torch.get_rng_state()
    bnnify.convert(model, select=SELECT, posterior_std=ResponseStd(X), inplace=True)
    assert model.inner.seen == []
    assert model.inner.calls == 0
    assert torch.equal(random, torch.get_rng_state())


class Random(Reads):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, training=True)


def test_a_module_on_which_noise_cannot_be_tried_is_refused_by_name():
    with pytest.raises(bnnify.ConversionError, match=r"`inner.weight` by calling `inner` \(Random\) again"):
        bnnify.convert(Called(Random), select=SELECT, posterior_std=ResponseStd(X))
    assert sigmas(bnnify.convert(Called(Random), select=SELECT, posterior_std={"out.*": ResponseStd(X)}))


def test_hooks_on_a_linear_layer_do_not_count_as_its_output():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    expected = sigmas(bnnify.convert(model, posterior_std=ResponseStd(X)))
    model[2].register_forward_hook(lambda module, args, output: {"scaled": 10 * output})
    found = sigmas(bnnify.convert(model, posterior_std=ResponseStd(X)))
    for name, sigma in expected.items():
        torch.testing.assert_close(found[name], sigma)


def test_a_parametrized_layer_is_judged_by_its_output_and_not_by_the_weight_that_it_computes():
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(6, 20, bias=False))
    x = torch.randn(64, 6) + 5  # noise sees the mean of the inputs, and the signal does not
    name = "parametrizations.weight.original1"
    sigma = sigmas(bnnify.convert(layer, posterior_std=ResponseStd(x, FRACTION)))[name]
    weight, before = layer.get_parameter(name).detach(), layer(x).detach()
    moved = [
        functional_call(layer, {name: weight + sigma * torch.randn_like(weight)}, (x,)).detach() - before
        for _ in range(100)
    ]
    assert torch.stack(moved).square().mean().sqrt() / before.std(0).square().mean().sqrt() == pytest.approx(
        FRACTION, rel=0.3
    )


def test_noise_that_hardly_moves_anything_is_no_larger_than_the_weights():
    model = Called(lambda: nn.LSTM(6, 6, batch_first=True))
    model.inner.register_forward_hook(lambda module, args, output: output[0])
    with torch.no_grad():
        model.inner.weight_hh_l0.mul_(1e-4)
    weight = model.inner.weight_hh_l0
    sigma = sigmas(bnnify.convert(model, posterior_std=ResponseStd(X, FRACTION)))["inner.weight_hh_l0"]
    torch.testing.assert_close(sigma.max(), weight.detach().square().mean().sqrt())


def test_half_precision_arithmetic_around_the_call_does_not_overflow():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    expected = sigmas(bnnify.convert(model, posterior_std=ResponseStd(X * 500)))
    with torch.autocast("cpu", dtype=torch.float16):
        found = sigmas(bnnify.convert(model, posterior_std=ResponseStd(X * 500)))
    for name, sigma in expected.items():
        torch.testing.assert_close(found[name], sigma, rtol=0.01, atol=0)


def test_examples_that_are_all_alike_tell_nothing():
    model = nn.Linear(6, 5)
    found = sigmas(bnnify.convert(model, posterior_std=ResponseStd(X[:1, 0].expand(33, 6))))
    for name, sigma in sigmas(bnnify.convert(model)).items():
        torch.testing.assert_close(found[name], sigma)


def test_what_cannot_be_run_says_why():
    with torch.device("meta"):
        on_meta = nn.Linear(6, 5)
    with pytest.raises(bnnify.ConversionError, match="`weight` is on the meta device"):
        bnnify.convert(on_meta, posterior_std=ResponseStd(X))
    with pytest.raises(bnnify.ArgumentTypeError, match="called with"):
        bnnify.convert(nn.Linear(6, 5), posterior_std=ResponseStd((X, X)))
    with pytest.raises(bnnify.ArgumentError, match="without batches"):
        bnnify.convert(nn.Linear(6, 5), posterior_std=ResponseStd([X[:0]]))


def test_a_tuning_that_fails_leaves_a_model_that_is_converted_in_place_plain():
    model = nn.Sequential(nn.Linear(6, 5), nn.LSTM(5, 3))
    before = state_of(model)[1]
    with pytest.raises(bnnify.BnnifyError, match="output="):
        bnnify.convert(model, posterior_std=ResponseStd(X, likelihood="logits"), inplace=True)
    assert state_of(model)[1] == before
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]


def test_tuning_reads_a_generator_once_and_leaves_what_is_bayesian_already():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    assert bnnify.convert(model, posterior_std=ResponseStd(iter(X.split(8)), likelihood="logits")).report.tuning
    half = bnnify.convert(model, select="0")
    expected = sigmas(half)
    more = bnnify.convert(half, select="2", posterior_std=ResponseStd(X))
    assert all(torch.equal(sigmas(more)[name], sigma) for name, sigma in expected.items())
    with pytest.raises(bnnify.ConversionError, match="tune_std afterwards"):
        bnnify.convert(half, select="2", posterior_std=ResponseStd(X, likelihood="logits"))
