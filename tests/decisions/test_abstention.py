"""Abstention keeps the risk that was asked for, as often as it promises to."""

import pytest
import torch

import bnnify
from tests.decisions.predictions import answered, classified, of_classes

REPETITIONS = 200


@pytest.mark.parametrize("told", [0.3, 1.0, 5.0])
def test_the_risk_is_kept_on_new_data_whether_or_not_the_probabilities_are_right(told):
    new, labels = of_classes(20_000, sharpness=4.0, told=told)
    wrong = new.mean.argmax(-1) != labels
    kept, accepted = 0, 0.0
    for _ in range(REPETITIONS):
        rule = bnnify.Abstention.fit(*of_classes(1000, sharpness=4.0, told=told), risk=0.1, confidence=0.9)
        accept = rule(new)
        kept += (wrong & accept).sum() <= 0.1 * accept.sum()
        accepted += accept.float().mean().item() / REPETITIONS
    assert kept >= REPETITIONS * 0.9 - 3 * (REPETITIONS * 0.9 * 0.1) ** 0.5
    assert 0.3 < accepted < 1  # of which some would be wrong more often


def test_everything_is_accepted_where_that_keeps_the_risk():
    prediction, _ = of_classes(500)
    rule = bnnify.Abstention.fit(prediction, prediction.mean.argmax(-1))
    assert (rule.accepted, rule.threshold) == (1.0, 0.0)
    assert rule(prediction).all()


def test_without_enough_data_or_with_too_many_errors_it_is_told_what_can_be_shown():
    prediction, labels = of_classes(50)
    with pytest.raises(
        bnnify.ArgumentError, match=r"no threshold keeps the risk of 0\.01.*50 data; the least .* 0\.\d"
    ):
        bnnify.Abstention.fit(prediction, labels, risk=0.01)
    with pytest.raises(bnnify.ArgumentError, match=r"risk\) must be a number between 0 and 1, not 5"):
        bnnify.Abstention.fit(prediction, labels, risk=5)
    with pytest.raises(bnnify.ArgumentError, match="pixels or tokens"):
        bnnify.Abstention.fit(classified(torch.full((5, 4, 3), 1 / 3)), torch.zeros(5, 4))


def test_yes_and_no_of_shape_n_1_are_decided_as_those_of_shape_n():
    torch.manual_seed(0)
    yes = torch.rand(400)
    targets = (torch.rand(400) < yes).long()
    one, row = answered(yes), answered(yes[:, None])
    for fit in (
        bnnify.Temperature.fit,
        lambda prediction, y: bnnify.ConformalSets.fit(prediction, y, coverage=0.8),
        lambda prediction, y: bnnify.Abstention.fit(prediction, y, risk=0.4),
    ):
        rules = [fit(one, targets), fit(row, targets), fit(row, targets[:, None])]
        assert rules[0] == rules[1] == rules[2]
    rule = bnnify.ConformalSets.fit(row, targets, coverage=0.8)
    assert torch.equal(rule(row), rule(one))
