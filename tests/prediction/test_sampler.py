"""The samples of a prediction: those of ordinary draws, made in the memory of the ones before, and in pairs."""

import copy

import pytest
import torch
from torch import nn

import bnnify
from bnnify.modules.parameters import bayesian_parameters
from bnnify.prediction.sampler import Sampler
from tests import zoo

K = 4


@pytest.fixture(autouse=True)
def without_gradient():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def converted(name):
    model, _ = zoo.build(name)
    return bnnify.convert(model, inplace=True)


def read(bnn, draw):
    """What the model's parameters read as in a draw."""
    with draw:
        return [getattr(p.module, p.attribute).clone() for p in bayesian_parameters(bnn.module)]


def sampled(bnn, num_samples=K, seed=1, **options):
    torch.manual_seed(seed)
    sampler = Sampler(bnn.module, **options)
    return [read(bnn, sampler.draw(number)) for number in range(num_samples)]


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["conv2d", "bfloat16", "lstm", "tied_language_model"])
def test_samples_are_those_of_ordinary_draws_bit_for_bit(name):
    bnn = converted(name)
    found = sampled(bnn)
    torch.manual_seed(1)
    for samples in found:
        with bnn.draw():
            expected = [getattr(p.module, p.attribute) for p in bayesian_parameters(bnn.module)]
        assert equal(samples, expected)
        assert [sample.dtype for sample in samples] == [tensor.dtype for tensor in expected]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("antithetic", [False, True])
def test_every_dtype_is_drawn_as_by_ordinary_draws(dtype, antithetic):
    bnn = bnnify.convert(nn.Linear(9, 7, dtype=dtype))
    found = sampled(bnn, 1, antithetic=antithetic)[0]
    torch.manual_seed(1)
    with bnn.draw():
        assert equal(found, [bnn.module.weight, bnn.module.bias])


def test_a_draw_overwrites_the_one_before():
    bnn = converted("mlp")
    sampler, places = Sampler(bnn.module), []
    for number in range(3):
        with sampler.draw(number):
            places.append([bnn.module[0].weight.data_ptr(), bnn.module[2].weight.data_ptr()])
    assert places[0] == places[1] == places[2]


@pytest.mark.parametrize("keep", [lambda w: w, lambda w: w.t(), lambda w: w[1:, 0].numpy()], ids=["", "view", "numpy"])
def test_a_sample_that_somebody_keeps_stays_what_it_was(keep):
    bnn = bnnify.convert(nn.Linear(4, 3))
    sampler, kept, copies = Sampler(bnn.module), [], []
    for number in range(3):
        with sampler.draw(number):
            kept.append(keep(bnn.module.weight))
            copies.append(copy.deepcopy(kept[-1]))
    assert all((a == b).all() for a, b in zip(kept, copies, strict=True))
    assert not (kept[0] == kept[1]).all()


def test_what_a_layer_attaches_to_a_sample_is_gone_with_it():
    bnn = bnnify.convert(nn.Linear(4, 3))
    sampler = Sampler(bnn.module)
    with sampler.draw(0):
        bnn.module.weight.cache = "of the first draw"
    with sampler.draw(1):
        assert not hasattr(bnn.module.weight, "cache")


def test_counting_again_gives_the_same_networks_and_leaves_the_generators_alone():
    bnn = converted("mlp")
    sampler = Sampler(bnn.module, repeatable=True)
    first = []
    for number in range(K):
        first.append(read(bnn, sampler.draw(number)))
        torch.rand(5)  # as dropout does
    state = torch.get_rng_state()
    assert all(equal(read(bnn, sampler.draw(number)), first[number]) for number in range(K))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["mlp", "float64", "lstm", "tied_language_model"])
def test_an_antithetic_pair_has_the_noise_and_its_negative(name):
    bnn = converted(name)
    parameters = list(bayesian_parameters(bnn.module))
    found = sampled(bnn, 5, antithetic=True)
    ordinary = sampled(bnn, 3)
    for first, second, plain in zip(found[::2], found[1::2], ordinary, strict=False):
        assert equal(first, plain)
        for a, b, parameter in zip(first, second, parameters, strict=True):
            assert not torch.equal(a, b)
            torch.testing.assert_close((a.double() + b) / 2, parameter.mean.double(), rtol=1e-6, atol=1e-7)
    assert equal(found[4], ordinary[2])  # which has no partner


def test_tied_parameters_share_a_sample_and_point_posteriors_have_none():
    tied = converted("tied_language_model")
    with Sampler(tied.module).draw(0):
        assert torch.equal(tied.module.embed.weight, tied.module.head.weight)
    bnn = bnnify.convert(nn.Linear(4, 3), posterior={"weight": bnnify.Point()})
    sampler = Sampler(bnn.module, antithetic=True)
    with sampler.draw(0):
        assert bnn.module.weight is bnn.module._parameters["weight"]
        assert bnn.module.bias is not bnn.module._parameters["bias"]


@pytest.mark.parametrize("antithetic", [False, True])
def test_pruned_weights_are_exactly_zero(antithetic):
    bnn = bnnify.convert(nn.Linear(8, 8))
    bnnify.prune(bnn, 0.5)
    zero = bnnify.collapse(bnn).weight == 0
    bnn.module._parameters["weight"].data.add_(0.1)  # as momentum does
    for weight, *_ in sampled(bnn, antithetic=antithetic):
        assert torch.equal(weight == 0, zero)


def test_a_weight_that_the_forward_changes_does_not_spoil_its_partner():
    bnn = bnnify.convert(nn.Linear(4, 3))
    expected = sampled(bnn, 2, antithetic=True)[1]
    torch.manual_seed(1)
    sampler = Sampler(bnn.module, antithetic=True)
    with sampler.draw(0):
        bnn.module.weight.zero_()
    assert equal(read(bnn, sampler.draw(1)), expected)


@pytest.mark.parametrize("antithetic", [False, True])
def test_mixed_dtypes_and_transforms_are_sampled_as_everywhere_else(antithetic):
    bnn = bnnify.convert(nn.Linear(4, 3))
    bnn.module.weight_rho.data = bnn.module.weight_rho.data.double()
    found, second = sampled(bnn, 2, antithetic=antithetic)
    torch.manual_seed(1)
    with bnn.draw():
        assert equal(found, [bnn.module.weight, bnn.module.bias])
    middle = (found[0] + second[0]) / 2
    assert torch.allclose(middle, bnn.module.weight.to(middle.dtype)) == antithetic
    plain = bnnify.convert(nn.Linear(4, 3))
    x = torch.randn(6, 4)
    stds = torch.func.vmap(lambda x: plain.predict(x, 3, antithetic=antithetic).std, randomness="different")(x)
    assert stds.shape == (6, 3)
    assert (stds > 0).all()
