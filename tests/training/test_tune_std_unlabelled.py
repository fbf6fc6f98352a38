"""Without labels tune_std finds the largest σ that stays within a tolerance of the mean network's own predictions."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical, Normal, Poisson, kl_divergence
from torch.utils.data import DataLoader, TensorDataset

import bnnify
from bnnify import tune_std
from tests import zoo

from .test_tune_std import averaged, overconfident, with_std


def classifier(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 24), nn.Tanh(), nn.Linear(24, 5)), torch.randn(400, 4)


def divergence(bnn, batches, num_samples=8):
    """KL(p0 ‖ averaged prediction) per datum, from a plain loop over draws."""
    with torch.no_grad():
        own = torch.cat([bnn.eval().module(x).double().softmax(-1) for x, _ in batches])
    return (own * (own / averaged(bnn, batches, num_samples)).log()).sum(-1).mean().item()


@pytest.mark.parametrize("tolerance", [0.002, 0.05])
def test_the_factor_keeps_to_the_tolerance_and_the_next_larger_one_does_not(tolerance):
    model, x = classifier()
    model[2].weight.data *= 4  # or it would bear σ as large as the weights
    bnn = bnnify.convert(model)
    start = with_std(bnn, 1.0)
    batches = [(part, None) for part in x.split(150)]
    tuned = tune_std(bnn, list(x.split(150)), likelihood="logits", labels=False, tolerance=tolerance)
    assert tuned.after == pytest.approx(divergence(bnn, batches), abs=1e-6)
    assert tuned.before == pytest.approx(divergence(start, batches), abs=1e-6)
    assert tuned.after <= tolerance
    larger = min(factor for factor, _ in tuned.tried if factor > tuned.factor)
    assert larger < 1.1 * tuned.factor
    assert divergence(with_std(start, larger), batches) > tolerance
    assert all(found > tolerance for factor, found in tuned.tried if factor > tuned.factor)


def test_it_does_not_matter_where_it_starts():
    model, x = classifier()
    for times in 1e-3, 50.0:
        bnn = bnnify.convert(model)
        found = tune_std(bnn, x, likelihood="logits", labels=False).factor
        other = with_std(bnnify.convert(model), times)
        assert tune_std(other, x, likelihood="logits", labels=False).factor == pytest.approx(found / times, rel=1e-3)


def test_a_calibrated_network_loses_about_the_tolerance_at_most_and_an_overconfident_one_gains():
    model, x = classifier()
    model[2].weight.data *= 3
    labels = Categorical(logits=model(x)).sample((50,))

    def change(sharpness):
        network, _ = classifier()
        network[2].weight.data *= 3 * sharpness
        network[2].bias.data *= sharpness
        bnn = bnnify.convert(network)
        tune_std(bnn, x, likelihood="logits", labels=False, tolerance=0.02)
        after = averaged(bnn, [(x, None)]).log()
        before = network(x).double().log_softmax(-1)
        return sum(F.nll_loss(after, y) - F.nll_loss(before, y) for y in labels).item() / len(labels)

    assert 0.01 < change(1.0) < 0.025
    assert change(4.0) < -0.05


class Halves(nn.Linear):
    """A mean and a variance."""

    def forward(self, x):
        out = super().forward(x)
        return out[:, :1], out[:, 1:].exp()


def exact(likelihood):
    """KL(p0 ‖ p) of one network, which is its own average, in closed form."""

    def of(bnn, x):
        own = likelihood(bnn.eval().module(x))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            with bnn.draw():
                drawn = likelihood(bnn.module(x))
        return kl_divergence(own, drawn).mean().item()

    return of


@pytest.mark.parametrize(
    ("build", "likelihood", "distribution"),
    [
        (nn.Linear, lambda mean: Normal(mean, 0.5), lambda mean: Normal(mean, 0.5)),
        (Halves, "gaussian", lambda pair: Normal(pair[0], pair[1].sqrt())),
        (nn.Linear, lambda out: Poisson(out.exp() + 5), lambda out: Poisson(out.exp() + 5)),
        (nn.Linear, "binary_logits", lambda out: torch.distributions.Bernoulli(logits=out)),
    ],
    ids=["Normal", "gaussian", "Poisson", "answers"],
)
def test_every_likelihood_is_measured_against_itself(build, likelihood, distribution):
    torch.manual_seed(0)
    bnn = bnnify.convert(build(4, 2))
    x = torch.randn(300, 4)
    with torch.no_grad():
        tuned = tune_std(bnn, x, likelihood=likelihood, labels=False, num_samples=1, tolerance=0.01)
        assert tuned.after <= 0.01
        assert exact(distribution)(bnn, x) == pytest.approx(tuned.after, rel=0.1)  # 64 targets err by 2-3 %
        assert exact(distribution)(with_std(bnn, 1.1), x) > 0.0095


def test_each_token_of_a_language_model_is_a_datum():
    torch.manual_seed(0)
    model, tokens = zoo.TiedLanguageModel(), torch.randint(0, 11, (6, 5))
    tuned = tune_std(bnnify.convert(model), tokens, likelihood="logits", labels=False)
    assert tuned.num_data == 30
    assert tuned.after <= 0.005


def test_the_data_may_have_every_form_that_predict_takes():
    model, x = classifier()
    y = torch.zeros(len(x))
    forms = [x, (x,), [x[:200], x[200:]], DataLoader(TensorDataset(x, y), 200), ((a, None) for a in x.split(200))]
    forms += [iter([x[:200], x[:0], x[200:]])]
    found = [tune_std(bnnify.convert(model), form, likelihood="logits", labels=False) for form in forms]
    assert [each.factor for each in found] == pytest.approx([found[0].factor] * len(found))
    assert {each.num_data for each in found} == {400}


def test_the_random_numbers_of_the_program_are_left_alone():
    model, x = classifier()
    state = torch.get_rng_state()
    tune_std(bnnify.convert(model), x, likelihood=lambda mean: Normal(mean, 1.0), labels=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_draw_in_effect_does_not_take_the_place_of_the_mean_network():
    model, x = classifier()
    bnn = bnnify.convert(model)
    found = tune_std(with_std(bnn, 1.0), x, likelihood="logits", labels=False).factor
    with bnn.draw():
        assert tune_std(bnn, x, likelihood="logits", labels=False).factor == found


def test_if_nothing_passes_it_takes_the_smallest_candidate_and_says_so():
    model, x = classifier()
    tuned = tune_std(bnnify.convert(model), x, likelihood=lambda mean: Normal(mean, 1e-6), labels=False)
    assert tuned.factor == min(factor for factor, _ in tuned.tried)
    assert tuned.ratio == pytest.approx(2**-10, rel=0.01)
    assert tuned.after > 0.005
    assert tuned.hardly_any_noise
    assert "Hardly any noise: even so little exceeds the tolerance" in str(tuned)


def test_an_untrained_network_gets_no_more_noise_than_its_weights_are_large_and_is_noticed():
    torch.manual_seed(0)
    hidden = [layer for _ in range(8) for layer in (nn.Linear(64, 64), nn.ReLU())]
    bnn = bnnify.convert(nn.Sequential(*hidden, nn.Linear(64, 10)))
    tuned = tune_std(bnn, torch.randn(64, 64), likelihood="logits", labels=False)
    assert tuned.ratio == pytest.approx(1, rel=0.01)
    assert tuned.factor == max(factor for factor, _ in tuned.tried)
    assert "the output hardly depends on the weights" in str(bnn.report)


@pytest.mark.parametrize("again", ["as it is", "saved", "saved in int8", "converted again", "trained"])
def test_a_prior_that_leaves_untrained_weights_room_stays_and_one_that_goes_by_the_std_moves(again, tmp_path):
    def tuned_prior(model):
        bnn = bnnify.convert(model)
        before = bnn.module[0].weight_initial_std.clone()
        if again.startswith("saved"):
            bnnify.save(bnn, tmp_path / "model.bnn.pt", dtype="int8" if again.endswith("int8") else None)
            bnn = bnnify.load(tmp_path / "model.bnn.pt", model)
        if again == "converted again":
            bnn = bnnify.convert(bnn)
        if again == "trained":
            with torch.no_grad():
                bnn.module[0].weight.mul_(30)
        tune_std(bnn, torch.randn(64, 4), likelihood="logits", labels=False)
        return before, bnn

    torch.manual_seed(0)
    before, bnn = tuned_prior(nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 32)))
    assert torch.equal(bnn.module[0].weight_initial_std, before)
    model, _ = classifier()
    with torch.no_grad():
        model[2].weight.add_(torch.outer(torch.randn(5), torch.randn(24)))  # as training does
    before, bnn = tuned_prior(model)
    sigma = F.softplus(bnn.module[0].weight_rho).square().mean().sqrt().item()
    assert 5 * bnn.module[0].weight_initial_std.item() == pytest.approx(sigma, rel=1e-4)


def test_classes_that_the_network_rules_out_cost_nothing():
    mask = torch.tensor([0.0, 0.0, -math.inf])
    model, x = classifier()
    bnn = bnnify.convert(nn.Sequential(model, nn.Linear(5, 3)))
    masked = {"likelihood": "logits", "labels": False, "output": lambda out: out + mask}
    plain = {"likelihood": "logits", "labels": False, "output": lambda out: out[:, :2]}
    found = [tune_std(with_std(bnn, 1.0), x, **options).factor for options in (masked, plain)]
    assert found[0] == found[1]


def test_it_says_what_it_needs():
    model, data = overconfident()
    bnn = bnnify.convert(model)
    with pytest.raises(ValueError, match="per_layer=True needs labels"):
        tune_std(bnn, data, likelihood="logits", labels=False, per_layer=True)
    with pytest.raises(ValueError, match="'values' does not tell how probable"):
        tune_std(bnn, data, labels=False)
    with pytest.raises(ValueError, match=r"tune_std\(tolerance\) must be a positive"):
        tune_std(bnn, data, likelihood="logits", labels=False, tolerance=0)
    with pytest.raises(ValueError, match="without batches"):
        tune_std(bnn, iter([]), likelihood="logits", labels=False)
    with pytest.raises(ValueError, match="all batches are empty"):
        tune_std(bnn, [torch.zeros(0, 2)], likelihood="logits", labels=False)
    with pytest.raises(ValueError, match="not a number in places"):
        nan = lambda out: Categorical(logits=out * math.nan, validate_args=False)  # noqa: E731
        tune_std(bnn, data, likelihood=nan, labels=False)
