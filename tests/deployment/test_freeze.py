"""Frozen networks: the draws that they are, what they share, and what takes them as plain modules."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import bnnify
from bnnify.modules.parameters import bayesian_parameters
from tests import zoo

K = 3


def drawn_outputs(bnn, inputs):
    """The outputs of the first K draws after a seed, each forward with the same dropout masks."""
    torch.manual_seed(1)
    draws = [bnnify.Draw(bayesian_parameters(bnn.module)) for _ in range(K)]
    outputs = []
    for draw in draws:
        torch.manual_seed(7)
        with draw:
            outputs.append(bnn.module(*inputs))
    return outputs


def frozen(bnn, **options):
    torch.manual_seed(1)
    return bnnify.freeze(bnn, K, **options)


def converted(name):
    model, inputs = zoo.build(name)
    return bnnify.convert(model, inplace=True), inputs


@pytest.mark.parametrize("name", ["residual_block", "lstm", "attention", "tied_language_model", "used_twice", "object"])
@torch.no_grad()
def test_its_networks_are_the_draws_after_the_same_seed(name):
    bnn, inputs = converted(name)
    buffers = copy.deepcopy(list(bnn.buffers()))
    ensemble = frozen(bnn)
    expected = drawn_outputs(bnn, inputs)
    for buffer, before in zip(bnn.buffers(), buffers, strict=True):
        buffer.copy_(before)
    assert len(ensemble.networks) == K
    for network, output in zip(ensemble.networks, expected, strict=True):
        torch.manual_seed(7)
        assert zoo.equal(network(*inputs), output)
        assert not any("Bayesian" in str(type(module).__mro__) for module in network.modules())
    assert not zoo.equal(*expected[:2])


def computed(compute):
    return nn.Sequential(compute(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 3))


@pytest.mark.parametrize(
    "compute",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.orthogonal,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "orthogonal", "old weight_norm", "old spectral_norm", "pruned"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@torch.no_grad()
def test_weights_that_are_computed_are_computed_from_what_was_drawn(compute):
    bnn = bnnify.convert(computed(compute).eval(), inplace=True)
    x = torch.randn(5, 4)
    expected = drawn_outputs(bnn, (x,))
    assert torch.equal(frozen(bnn)(x), torch.stack(expected))
    assert not torch.equal(expected[0], expected[1])


@pytest.mark.parametrize("name", ["mlp", "dict", "lstm", "tied_language_model"])
@torch.no_grad()  # without which torch computes a recurrent layer in another order
def test_it_stacks_outputs_as_sampling_does(name):
    bnn, inputs = converted(name)
    ensemble = frozen(bnn.eval())
    torch.manual_seed(1)
    expected = bnn.sample(*inputs, num_samples=K)
    found = ensemble(*inputs)
    assert type(found) is type(expected)
    assert zoo.equal(found, expected)


def test_the_networks_share_all_that_is_not_drawn():
    bnn, _ = converted("residual_block")
    ensemble = frozen(bnn)
    drawn = {p.name: p.mean.numel() for p in bayesian_parameters(bnn.module)}
    first, *others = ensemble.networks
    for other in others:
        for name, tensor in [*first.named_parameters(), *first.named_buffers()]:
            same = dict([*other.named_parameters(), *other.named_buffers()])[name]
            assert (same is tensor) == (name not in drawn)
    deterministic = sum(p.numel() for p in bnnify.collapse(bnn).parameters()) - sum(drawn.values())
    assert sum(p.numel() for p in ensemble.parameters()) == deterministic + K * sum(drawn.values())


def test_what_is_drawn_is_frozen_and_the_rest_is_as_it_was():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    model[1].bias.requires_grad_(False)
    ensemble = frozen(bnnify.convert(model))
    wants = {name: parameter.requires_grad for name, parameter in ensemble.networks[1].named_parameters()}
    expected = {"0.weight": False, "0.bias": False, "2.weight": False, "2.bias": False}
    assert wants == {**expected, "1.weight": True, "1.bias": False}


def test_tied_weights_stay_tied():
    bnn, _ = converted("tied_language_model")
    for network in frozen(bnn).networks:
        assert network.head.weight is network.embed.weight


def test_what_happens_to_the_model_later_does_not_reach_it():
    bnn, inputs = converted("residual_block")
    ensemble = frozen(bnn.eval())
    before = ensemble(*inputs)
    for tensor in [*bnn.parameters(), *(b for b in bnn.buffers() if b.is_floating_point())]:
        tensor.data.add_(1.0)
    assert torch.equal(ensemble(*inputs), before)


def test_freezing_leaves_the_model_as_it_is():
    bnn, _ = converted("encoder")
    before, types = copy.deepcopy(bnn.state_dict()), [type(module) for module in bnn.modules()]
    frozen(bnn)
    assert types == [type(module) for module in bnn.modules()]
    assert all(torch.equal(before[name], tensor) for name, tensor in bnn.state_dict().items())


def test_every_module_has_the_flag_that_it_had():
    bnn, _ = converted("residual_block")
    bnn.train()
    bnn.module.bn1.eval()
    ensemble = frozen(bnn)
    assert ensemble.training
    for network in ensemble.networks:
        assert [m.training for m in network.modules()] == [m.training for m in bnn.module.modules()]


@pytest.mark.parametrize("name", ["attention", "dict"])
def test_export_takes_it(name):
    bnn, inputs = converted(name)
    ensemble = frozen(bnn.eval())
    exported = torch.export.export(ensemble, inputs).module()
    for found, expected in zip(zoo.tensors(exported(*inputs)), zoo.tensors(ensemble(*inputs)), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_fresh_process_unpickles_it(tmp_path):
    ensemble = frozen(bnnify.convert(nn.Sequential(nn.Linear(4, 3), nn.LSTM(3, 2))))
    x = torch.randn(5, 4)
    (tmp_path / "ensemble").write_bytes(pickle.dumps((ensemble, x)))
    program = (
        f"import pickle; m, x = pickle.load(open({str(tmp_path / 'ensemble')!r}, 'rb')); print(m(x)[0].sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) == ensemble(x)[0].sum().item()


def test_copies_and_state_dicts_hold_all_networks():
    bnn, inputs = converted("mlp")
    ensemble = frozen(bnn)
    expected = ensemble(*inputs)
    copied = copy.deepcopy(ensemble)
    other = bnnify.freeze(bnn, K)
    assert torch.equal(copied(*inputs), expected)
    assert not torch.equal(other(*inputs), expected)
    other.load_state_dict(ensemble.state_dict())
    assert torch.equal(other(*inputs), expected)


def test_an_antithetic_pair_lies_on_both_sides_of_the_mean():
    bnn = bnnify.convert(nn.Linear(4, 3, dtype=torch.float64))
    first, second, alone = (network.weight for network in frozen(bnn, antithetic=True).networks)
    torch.testing.assert_close((first + second) / 2, bnn.module.weight, rtol=1e-14, atol=1e-14)
    assert not torch.equal(first, second)
    assert not torch.equal(alone, first)


def test_pruned_weights_are_zero_in_every_network():
    bnn = bnnify.convert(nn.Linear(8, 8))
    bnnify.prune(bnn, 0.5)
    pruned = bnnify.collapse(bnn).weight == 0
    assert pruned.any()
    for network in frozen(bnn, antithetic=True).networks:
        assert torch.equal(network.weight == 0, pruned)


def test_point_posteriors_are_the_same_in_every_network():
    bnn = bnnify.convert(nn.Linear(4, 3), posterior={"weight": bnnify.Point()})
    first, second, _ = frozen(bnn).networks
    assert torch.equal(first.weight, second.weight)
    assert not torch.equal(first.bias, second.bias)
