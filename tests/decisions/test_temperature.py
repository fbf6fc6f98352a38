"""A temperature on averaged probabilities: it finds what the labels say, and leaves the order of the classes."""

import pytest
import torch
import torch.nn.functional as F

import bnnify
from tests.decisions.predictions import answered, classified, of_classes


@pytest.mark.parametrize("told", [0.5, 1.0, 4.0])
def test_it_finds_the_factor_by_which_logits_are_too_large(told):
    prediction, labels = of_classes(20_000, told=told)
    fitted = bnnify.Temperature.fit(prediction, labels)
    assert abs(fitted.temperature / told - 1) < 0.05
    nll = {
        factor: F.nll_loss(bnnify.Temperature(fitted.temperature * factor)(prediction).mean.log(), labels).item()
        for factor in (0.98, 1.0, 1.02)
    }
    assert nll[1.0] == min(nll.values())


def test_it_is_that_of_softmax_along_any_dimension_and_keeps_what_is_on_top():
    logits = torch.randn(4, 3, 2, 2)
    prediction, labels = classified(logits.softmax(1), class_dim=-3), torch.randint(3, (4, 2, 2))
    tempered = bnnify.Temperature(2.0)(prediction)
    torch.testing.assert_close(tempered.mean, (logits / 2).softmax(1))
    torch.testing.assert_close(tempered.predictive_entropy, torch.special.entr(tempered.mean).sum(1))
    assert torch.equal(tempered.mean.argmax(1), prediction.mean.argmax(1))
    assert tempered.mutual_information is None
    flat = classified(prediction.mean.movedim(1, -1).reshape(-1, 3))
    assert bnnify.Temperature.fit(prediction, labels) == bnnify.Temperature.fit(flat, labels.flatten())


def test_of_yes_and_no_it_is_that_of_the_logit():
    logits = torch.randn(7)
    tempered = bnnify.Temperature(3.0)(answered(logits.sigmoid()))
    torch.testing.assert_close(tempered.mean, (logits / 3).sigmoid())
    assert bnnify.Temperature.fit(answered(logits.sigmoid()), (logits > 0).long()).temperature == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("prediction", "targets", "words"),
    [
        (torch.ones(3, 2), torch.zeros(3), "takes a Prediction, as bnn.predict gives it, not a Tensor"),
        (bnnify.Prediction(torch.ones(3), torch.ones(3), 1), torch.zeros(3), "needs probabilities of classes"),
        (classified(torch.full((3, 2), torch.nan)), torch.zeros(3), "not finite"),
        (classified(torch.full((3, 2), 0.5)), torch.zeros(3, 2), r"shape \(3, 2\).*of shape \(3,\)"),
        (classified(torch.full((3, 2), 0.5)), [0, 1, 0], "the targets must be a tensor"),
        (classified(torch.full((3, 2), 0.5)), torch.tensor([0, 1, 2]), "from 0 to 1, and one is 2"),
        (classified(torch.full((0, 2), 0.5)), torch.zeros(0), "at least one"),
    ],
)
def test_what_has_no_classes_or_labels_is_refused(prediction, targets, words):
    with pytest.raises(bnnify.ArgumentError, match=words):
        bnnify.Temperature.fit(prediction, targets)
