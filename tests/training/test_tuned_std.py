"""What tune_std leaves behind: a result that speaks, a line in the report, and a prior that has moved along."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical

import bnnify
from bnnify.modules.parameters import unique_bayesian_parameters
from tests import zoo

from .test_tune_std import overconfident, stds


def test_the_result_and_the_report_say_what_was_done():
    model, data = overconfident()
    bnn = bnnify.convert(model)
    plain = str(bnn.report)
    tuned = bnnify.tune_std(bnn, data, likelihood="logits")
    x, y = data.dataset.tensors
    assert tuned.deterministic == pytest.approx(F.cross_entropy(model(x), y).item(), abs=1e-5)
    assert tuned.after == min(loss for _, loss in tuned.tried)
    assert (1.0, tuned.before) in tuned.tried
    assert tuned.num_data == 300
    assert not tuned.hardly_any_noise
    assert "Hardly" not in str(tuned)
    assert f"NLL {tuned.before:.4f} → {tuned.after:.4f}, of the mean network {tuned.deterministic:.4f}" in str(tuned)
    for again in bnn, copy.deepcopy(bnn), pickle.loads(pickle.dumps(bnn)):
        assert str(again.report) == f"{plain}\ntuned: {tuned}"
    bnnify.tune_std(bnn, x, likelihood="logits", labels=False)
    assert str(bnn.report).count("tuned:") == 1
    assert "KL from the mean network" in str(bnn.report)


def test_a_network_that_is_as_certain_as_it_should_be_is_noticed():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 4), torch.randn(20_000, 3)
    labels = Categorical(logits=model(x)).sample()
    tuned = bnnify.tune_std(bnnify.convert(model), [(x, labels)], likelihood="logits")
    assert tuned.hardly_any_noise
    assert "Hardly any noise: the network is about as certain as it should be" in str(tuned)


def test_the_size_of_σ_is_told_relative_to_the_weights():
    model, data = overconfident()
    bnn = bnnify.convert(model)
    ratio = bnnify.tune_std(bnn, data, num_samples=2, likelihood="logits").ratio
    sigma = torch.cat([each.flatten() for each in stds(bnn).values()])
    means = torch.cat([each.mean.detach().flatten() for each in unique_bayesian_parameters(bnn.module)])
    assert ratio == pytest.approx((sigma.square().mean() / means.square().mean()).sqrt().item(), rel=1e-4)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("build", [lambda: overconfident()[0], zoo.TiedLanguageModel], ids=["classifier", "tied"])
def test_the_prior_moves_along_so_that_the_kl_is_what_it_was(build, per_layer):
    model = build()
    tokens = torch.randint(0, 11, (8, 5))
    data = [(tokens, tokens)] if isinstance(model, zoo.TiedLanguageModel) else overconfident()[1]
    bnn = bnnify.convert(model, posterior_std=0.02)
    kl = bnn.kl().item()
    tuned = bnnify.tune_std(bnn, data, num_samples=2, likelihood="logits", per_layer=per_layer)
    assert abs(tuned.factor - 1) > 0.1
    assert bnn.kl().item() == pytest.approx(kl, abs=1e-2)
    for name, sigma in stds(bnn).items():
        place = next(each for each in unique_bayesian_parameters(bnn.module) if each.name == name)
        torch.testing.assert_close(place.initial_std, sigma.flatten()[:1], rtol=1e-4, atol=0)


def test_a_prior_with_a_scale_of_its_own_stays():
    model, data = overconfident()
    bnn = bnnify.convert(model, prior=bnnify.Pretrained(std=0.1))
    before = bnn.kl().item()
    bnnify.tune_std(bnn, data, num_samples=2, likelihood="logits")
    assert bnn.kl().item() != pytest.approx(before, rel=0.01)


def test_convert_tune_train_predict():
    model, data = overconfident()
    bnn = bnnify.convert(model)
    bnnify.tune_std(bnn, data, likelihood="logits")
    tuned = stds(bnn)
    x, y = data.dataset.tensors

    def nll():
        torch.manual_seed(0)
        return F.nll_loss(bnn.predict(x, 100, likelihood="logits").mean.log(), y)

    before = nll()
    optimizer = torch.optim.Adam(bnn.parameter_groups(lr=1e-3, rho_lr=5e-2))
    for _ in range(30):
        logits, kl = bnn(x)
        loss = bnnify.elbo(F.cross_entropy(logits, y), kl, num_data=len(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, sigma in stds(bnn).items():
        assert 0.7 < (sigma / tuned[name]).log().mean().exp() < 1.3, name
    assert nll() < before + 0.02
    assert nll() < F.cross_entropy(model(x), y) - 0.2


def test_weights_that_are_loaded_later_start_with_a_σ_and_a_prior_that_fit_each_other():
    model, data = overconfident()
    other, _ = overconfident()
    with torch.no_grad():
        other[0].weight *= 3
    fresh = bnnify.convert(copy.deepcopy(other), prior=bnnify.Pretrained())
    bnn = bnnify.convert(model, prior=bnnify.Pretrained())
    bnnify.tune_std(bnn, data, num_samples=2, likelihood="logits")
    state = copy.deepcopy(bnn.module.state_dict())
    bnnify.load_weights(bnn, state)
    assert bnn.report.tuning
    bnnify.load_weights(bnn, other.state_dict())
    assert not bnn.report.tuning
    for name, sigma in stds(bnn).items():
        torch.testing.assert_close(sigma, stds(fresh)[name])
    assert bnn.kl().item() == pytest.approx(0, abs=1e-2)
    bnnify.load_weights(bnn, state)
    assert all(torch.equal(state[name], value) for name, value in bnn.module.state_dict().items())


def test_a_file_has_the_tuned_σ_and_the_prior_that_moved_along(tmp_path):
    model, data = overconfident()
    bnn = bnnify.convert(model)
    bnnify.tune_std(bnn, data, num_samples=2, likelihood="logits")
    bnnify.save(bnn, tmp_path / "tuned.pt")
    again = bnnify.load(tmp_path / "tuned.pt", model=overconfident()[0])
    for name, value in bnn.module.state_dict().items():
        assert torch.equal(again.module.state_dict()[name], value)


def test_progress_shows_every_factor_with_its_loss(capsys):
    pytest.importorskip("rich")
    model, data = overconfident()
    tuned = bnnify.tune_std(bnnify.convert(model), data, num_samples=2, likelihood="logits", progress=True)
    shown = capsys.readouterr().err
    for factor, loss in tuned.tried:
        assert f"σ × {factor:.3g}: {loss:.4f} nats per datum" in shown
