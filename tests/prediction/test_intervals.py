"""Intervals of a regression cover what they say, and are refused where the noise of the data is not known."""

import pytest
import torch
from torch import nn

import bnnify


def linear(std):
    """A linear network with the right weights and this relative σ, and its data with noise of 0.5."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    x = torch.randn(4000, 3)
    y = model(x).detach() + 0.5 * torch.randn(4000, 1)
    return bnnify.convert(model, posterior_std=std), x, y


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95])
def test_they_cover_their_level_of_new_data_where_the_noise_is_right(level):
    bnn, x, y = linear(std=0.01)
    low, high = bnn.predict(x, likelihood=bnnify.GaussianNLL(std=0.5)).interval(level)
    covered = ((low <= y) & (y <= high)).float().mean().item()
    assert abs(covered - level) < 4 * (level * (1 - level) / 4000) ** 0.5


def test_they_are_those_of_draws_from_the_networks_with_their_noise():
    bnn, x, _ = linear(std=0.3)
    prediction = bnn.predict(x[:5], 2000, seed=0, likelihood=bnnify.GaussianNLL(std=0.5))
    with torch.no_grad():
        means = bnn.sample(x[:5], num_samples=2000)
    draws = means + 0.5 * torch.randn(20, 2000, 5, 1)
    low, high = prediction.interval(0.9)
    torch.testing.assert_close(prediction.total_std, draws.flatten(0, 1).std(0), rtol=0.05, atol=0)
    torch.testing.assert_close(low, draws.flatten(0, 1).quantile(0.05, 0), rtol=0.05, atol=0.05)
    torch.testing.assert_close(high, draws.flatten(0, 1).quantile(0.95, 0), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("likelihood", "level", "words"),
    [
        ("values", 0.9, "the NLL module of the training, likelihood=nll"),
        ("logits", 0.9, "bnnify.ConformalSets"),
        (bnnify.GaussianNLL(std=1.0), 90, r"interval\(level\) must be a number between 0 and 1, not 90"),
    ],
)
def test_without_known_noise_or_with_another_level_they_are_refused(likelihood, level, words):
    prediction = bnnify.convert(nn.Linear(3, 2)).predict(torch.randn(4, 3), 4, likelihood=likelihood)
    with pytest.raises(bnnify.ArgumentError, match=words):
        prediction.interval(level)


def test_of_patients_they_cover_their_level_after_the_way_of_the_docs():
    pytest.importorskip("rich")
    pytest.importorskip("sklearn")
    pytest.importorskip("torchmetrics")
    from benchmarks.quality.regression_intervals import diabetes, judged, network, trained

    train, held_out, test = diabetes(seed=0)
    plain = trained(network(10), None, train, steps=100, beta=1.0)
    bnn, nll = bnnify.convert(plain), bnnify.GaussianNLL(std=0.5, learned=True)
    found = judged(trained(bnn, nll, train, steps=300, beta=1.0), nll, held_out, test)
    spread = bnn.predict(test[0], 50, seed=0)
    alone = ((spread.mean - test[1]).abs() <= 1.645 * spread.std).float().mean().item()
    assert 0.8 < found["90 % coverage"] < 0.98
    assert 0.8 < found["conformal"] < 0.98
    assert alone < 0.5  # which total_std used to be
