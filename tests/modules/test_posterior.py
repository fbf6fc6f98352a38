"""A posterior of one's own is one new class: here one whose weights share a direction in which they move together."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import bnnify
from bnnify.modules import PosteriorFamily, bayesian_parameters


@dataclass(frozen=True)
class OneDirection(PosteriorFamily):
    """w = μ + v·ε with one ε ~ N(0, 1); the entropy of its line is log|v| + log(2πe)/2."""

    companions = ("_direction",)

    def start(self, mean, std):
        return {"_direction": std.to(mean.dtype).expand_as(mean).contiguous()}

    def fits(self, mean, *companions):
        return companions[0].shape == mean.shape

    def noise(self, parameter, generator=None):
        return torch.randn((), generator=generator, dtype=parameter.mean.dtype)

    def sample(self, parameter, noise=None):
        noise = self.noise(parameter) if noise is None else noise
        return parameter.mean + parameter.companion("_direction") * noise

    def kl(self, parameter):
        entropy = parameter.companion("_direction").norm().log() + 0.5 * math.log(2 * math.pi * math.e)
        return -entropy - parameter.prior.log_prob(parameter.drawn()).sum()


@pytest.fixture
def bnn():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    return bnnify.convert(
        model, prior=bnnify.Gaussian(), posterior={"0": OneDirection(), "2": bnnify.MeanField()}, posterior_std=0.1
    )


def test_it_stands_beside_the_others_and_moves_as_it_says(bnn):
    layer = bnn.module[0]
    assert "OneDirection" in str(bnn.report)
    assert set(bnn.module.state_dict()) >= {"0.weight_direction", "0.bias_direction", "2.weight_rho"}
    assert "0.weight_rho" not in bnn.module.state_dict()
    moved = []
    for _ in range(200):
        with bnn.draw():
            moved.append((layer.weight - layer._parameters["weight"]) / layer.weight_direction)
    moved = torch.stack(moved).detach()
    torch.testing.assert_close(moved, moved[:, :1, :1].expand_as(moved))
    assert abs(moved[:, 0, 0].mean()) < 5 / math.sqrt(200)
    assert abs(moved[:, 0, 0].var() - 1) < 5 * math.sqrt(2 / 200)


def test_it_trains_predicts_freezes_copies_and_goes_back(bnn):
    x = torch.randn(5, 4)
    output, kl = bnn(x)
    (output.square().sum() + kl).backward()
    assert all((each.grad != 0).any() for p in bayesian_parameters(bnn.module) for each in p.companions.values())
    assert {group["name"]: len(group["params"]) for group in bnn.parameter_groups(lr=0.1)}["rho"] == 4
    torch.manual_seed(1)
    expected = torch.stack([bnn(x)[0] for _ in range(400)]).std(0)
    found = bnn.predict(x, num_samples=400, antithetic=True)
    torch.testing.assert_close(found.std, expected, rtol=0.25, atol=0.02)
    torch.manual_seed(2)
    frozen = bnnify.freeze(bnn, 3)(x)
    torch.manual_seed(2)
    torch.testing.assert_close(frozen, bnn.sample(x, num_samples=3))
    assert torch.equal(bnnify.collapse(bnn)(x), bnn.module(x))
    bnn.module.load_state_dict(bnn.module.state_dict())


def test_what_looks_at_each_sigma_leaves_it_alone_and_files_and_estimators_refuse_it(bnn, tmp_path):
    assert bnnify.prune(bnn, 0.5).numel == 6 * 3 + 3
    with pytest.raises(bnnify.CheckpointError, match=r"Cannot save `0.weight`.*OneDirection"):
        bnnify.save(bnn, tmp_path / "x.bnn.pt")
    with pytest.raises(bnnify.ConversionError, match="MeanField"):
        bnnify.convert(nn.Linear(3, 2), posterior=OneDirection(), estimator="local", prior=bnnify.Gaussian())
    with pytest.raises(bnnify.ConversionError, match=r"Unknown posterior 'point'.*Point\(\)"):
        bnnify.convert(nn.Linear(3, 2), posterior="point")
    with pytest.raises(bnnify.ConversionError, match=r"Unknown estimator 'point'.*posterior=bnnify.Point\(\)"):
        bnnify.convert(nn.Linear(3, 2), estimator="point")


@dataclass(frozen=True)
class Doubled(OneDirection):
    """One that calls what stands beside its mean ρ, and is no mean-field posterior for all that."""

    companions = ("_rho", "_direction")

    def start(self, mean, std):
        return {"_rho": torch.full_like(mean, -9.0), **super().start(mean, std)}


def test_only_the_mean_field_posterior_is_taken_for_one():
    torch.manual_seed(0)
    bnn = bnnify.convert(nn.Linear(4, 3), prior=bnnify.Gaussian(), posterior=Doubled(), posterior_std=0.5)
    x = torch.ones(2, 4)
    expected = bnn.sample(x, num_samples=400).std(0)
    torch.testing.assert_close(bnn.predict(x, num_samples=400).std, expected, rtol=0.2, atol=0.0)
    with pytest.raises(bnnify.ArgumentError, match="nothing to tune"):
        bnnify.tune_std(bnn, [(x, torch.zeros(2, dtype=torch.long))], likelihood="logits")
    with pytest.raises(bnnify.ArgumentTypeError, match="must derive from PosteriorFamily"):

        class Wider(bnnify.MeanField):
            pass
