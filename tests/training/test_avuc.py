"""AvUC: the loss against a loop over the predictions, its gradient, its corners, and the threshold."""

import math

import pytest
import torch
import torch.nn.functional as F

from bnnify import avuc_loss, uncertainty_threshold


def predictions(count=40, classes=5, dtype=torch.float64):
    """Probabilities of which some are sharp and some flat, and labels that agree with about half of them."""
    logits = torch.randn(count, classes, dtype=dtype) * torch.linspace(0.2, 6.0, count, dtype=dtype)[:, None]
    labels = torch.where(torch.rand(count) < 0.5, logits.argmax(-1), torch.randint(classes, (count,)))
    return logits.softmax(-1), labels


def entropy(probabilities):
    return -sum(p * math.log(p) for p in probabilities if p > 0)


def in_a_loop(probabilities, labels, threshold, uncertainties):
    """The loss as the paper writes it: four sums over the predictions."""
    n = {"AC": 0.0, "AU": 0.0, "IC": 0.0, "IU": 0.0}
    for p, label, u in zip(probabilities.tolist(), labels.tolist(), uncertainties, strict=True):
        confidence = max(p)
        accurate, certain = p.index(confidence) == label, u <= threshold
        weight = (confidence if accurate else 1 - confidence) * (1 - math.tanh(u) if certain else math.tanh(u))
        n[("A" if accurate else "I") + ("C" if certain else "U")] += weight
    assert all(n.values())
    return math.log(1 + (n["AU"] + n["IC"]) / (n["AC"] + n["IU"]))


@pytest.mark.parametrize("threshold", [0.3, 0.7, 1.2])
def test_it_is_the_papers_formula_with_the_entropy_as_uncertainty(threshold):
    probabilities, labels = predictions()
    expected = in_a_loop(probabilities, labels, threshold, [entropy(p) for p in probabilities.tolist()])
    assert avuc_loss(probabilities, labels, threshold).item() == pytest.approx(expected, rel=1e-12)
    assert avuc_loss(probabilities, labels, torch.tensor(threshold)).item() == pytest.approx(expected, rel=1e-12)


def test_another_uncertainty_takes_the_place_of_the_entropy():
    probabilities, labels = predictions()
    uncertainty = torch.rand(len(labels), dtype=torch.float64)
    expected = in_a_loop(probabilities, labels, 0.4, uncertainty.tolist())
    assert avuc_loss(probabilities, labels, 0.4, uncertainty).item() == pytest.approx(expected, rel=1e-12)


def test_it_depends_neither_on_the_order_nor_on_the_shape_of_the_batch_nor_on_how_often_it_is_repeated():
    probabilities, labels = predictions()
    loss, order = avuc_loss(probabilities, labels, 0.7), torch.randperm(len(labels))
    torch.testing.assert_close(avuc_loss(probabilities[order], labels[order], 0.7), loss)
    torch.testing.assert_close(avuc_loss(probabilities.view(8, 5, 5), labels.view(8, 5), 0.7), loss)
    torch.testing.assert_close(avuc_loss(probabilities.repeat(3, 1), labels.repeat(3), 0.7), loss)


def test_gradcheck():
    probabilities, labels = predictions(count=12)
    uncertainty = torch.rand(12, dtype=torch.float64, requires_grad=True)
    logits = probabilities.log().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: avuc_loss(x.softmax(-1), labels, 0.7), logits)
    assert torch.autograd.gradcheck(lambda x, u: avuc_loss(x.softmax(-1), labels, 0.4, u), (logits, uncertainty))


SHARP, FLAT = [1.0, 0.0], [0.5, 0.5]
CORNERS = {
    "accurate and certain": ([SHARP, SHARP], [0, 0], 0.5),
    "inaccurate and certain": ([SHARP, [0.9, 0.1]], [1, 1], 0.5),
    "accurate and uncertain": ([FLAT, FLAT], [0, 0], 0.1),
    "inaccurate and uncertain": ([FLAT, FLAT], [1, 1], 0.1),
    "no predictions": (torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), 0.5),
    "more than one by rounding": ([[1.0 + 2**-23, 0.0], [0.0, 1.0 + 2**-23]], [1, 1], 0.0),
}


@pytest.mark.parametrize("corner", CORNERS)
def test_loss_and_gradient_are_finite_at_the_corners(corner):
    probabilities, labels, threshold = CORNERS[corner]
    probabilities = torch.as_tensor(probabilities).requires_grad_()
    loss = avuc_loss(probabilities, torch.as_tensor(labels), threshold)
    loss.backward()
    assert loss.isfinite()
    assert loss >= 0
    assert probabilities.grad.isfinite().all()


def test_it_is_zero_where_every_prediction_is_as_it_should_be_and_large_where_none_is():
    def loss(corner):
        probabilities, labels, threshold = CORNERS[corner]
        return avuc_loss(torch.as_tensor(probabilities), torch.as_tensor(labels), threshold)

    assert loss("accurate and certain") == loss("inaccurate and uncertain") == 0
    assert loss("inaccurate and certain") > 10
    assert loss("accurate and uncertain") > 10


def test_half_precision_is_computed_in_single():
    probabilities, labels = predictions(dtype=torch.float32)
    half = probabilities.half()
    assert avuc_loss(half, labels, 0.7).dtype == torch.float32
    assert avuc_loss(half, labels, 0.7) == avuc_loss(half.float(), labels, 0.7)


def test_the_threshold_is_midway_between_the_mean_uncertainties():
    probabilities, labels = predictions()
    accurate = (probabilities.argmax(-1) == labels).tolist()
    uncertainties = [entropy(p) for p in probabilities.tolist()]
    hits = [u for u, hit in zip(uncertainties, accurate, strict=True) if hit]
    misses = [u for u, hit in zip(uncertainties, accurate, strict=True) if not hit]
    expected = (sum(hits) / len(hits) + sum(misses) / len(misses)) / 2
    assert uncertainty_threshold(probabilities, labels) == pytest.approx(expected, rel=1e-12)


def test_the_threshold_is_of_the_uncertainty_that_is_given():
    uncertainty = torch.tensor([0.1, 0.3, 0.6])
    probabilities = torch.tensor([SHARP, SHARP, SHARP])
    assert uncertainty_threshold(probabilities, torch.tensor([0, 0, 1]), uncertainty) == pytest.approx(0.4)


@pytest.mark.parametrize(("labels", "kind"), [([0, 0], "accurate"), ([1, 1], "inaccurate")])
def test_a_threshold_from_one_kind_of_prediction_alone_is_refused(labels, kind):
    with pytest.raises(ValueError, match=f"All 2 predictions are {kind}.*validation data"):
        uncertainty_threshold(torch.tensor([SHARP, SHARP]), torch.tensor(labels))


@pytest.mark.parametrize("function", [lambda p, y, u: avuc_loss(p, y, 0.5, u), uncertainty_threshold])
def test_shapes_that_do_not_fit_are_refused_and_named(function):
    probabilities, labels = predictions()
    for wrong in (labels[:, None], labels[:-1], F.one_hot(labels)):
        with pytest.raises(ValueError, match="classes in the last dimension") as error:
            function(probabilities, wrong, None)
        assert str(tuple(wrong.shape)) in str(error.value)
    with pytest.raises(ValueError, match="averaged over draws"):
        function(torch.stack([probabilities, probabilities]), labels, None)
    with pytest.raises(ValueError, match=r"one uncertainty for each label.*\(40, 1\)"):
        function(probabilities, labels, torch.zeros(40, 1))
