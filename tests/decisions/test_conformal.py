"""Conformal sets and intervals cover what they promise, however wrong the predictions are, and agree with MAPIE."""

import pytest
import torch

import bnnify
from bnnify.prediction import Prediction
from tests.decisions.predictions import answered, classified, of_classes, of_numbers

REPETITIONS, HELD_OUT, NEW = 200, 99, 200


def mean_coverage(covered):
    """The mean over repetitions, and its standard error."""
    found = torch.tensor([covered() for _ in range(REPETITIONS)])
    return found.mean().item(), (found.std() / REPETITIONS**0.5).item()


@pytest.mark.parametrize("told", [0.3, 1.0, 5.0])
@pytest.mark.parametrize(("score", "above"), [("lac", 0.01), ("aps", 0.2)])
def test_sets_hold_the_true_class_as_often_as_promised(score, above, told):
    def covered():
        sets = bnnify.ConformalSets.fit(*of_classes(HELD_OUT, told=told), coverage=0.8, score=score)
        prediction, labels = of_classes(NEW, told=told)
        return sets(prediction).gather(-1, labels[:, None]).float().mean()

    mean, error = mean_coverage(covered)
    assert 0.8 - 3 * error < mean < 0.8 + above + 3 * error


@pytest.mark.parametrize("told", [0.2, 1.0])
@pytest.mark.parametrize("known", [True, False])
def test_intervals_hold_the_observation_as_often_as_promised(known, told):
    def covered():
        intervals = bnnify.ConformalIntervals.fit(*of_numbers(HELD_OUT, told, known), coverage=0.9)
        prediction, y = of_numbers(NEW, told, known)
        low, high = intervals(prediction)
        return ((low <= y) & (y <= high)).float().mean()

    mean, error = mean_coverage(covered)
    assert 0.9 - 3 * error < mean < 0.91 + 3 * error


def test_intervals_go_with_the_noise_where_it_is_known():
    prediction, y = of_numbers(500, told=0.5)
    intervals = bnnify.ConformalIntervals.fit(prediction, y)
    low, high = intervals(prediction)
    torch.testing.assert_close((high - low) / prediction.total_std, torch.full((500,), 2 * intervals.factor))
    assert 2.5 < intervals.factor < 4.2  # 1.64 / 0.5


@pytest.mark.parametrize("score", ["lac", "aps"])
def test_sets_are_those_of_mapie(score):
    sklearn = pytest.importorskip("sklearn.base")
    mapie = pytest.importorskip("mapie.classification")

    class Given(sklearn.ClassifierMixin, sklearn.BaseEstimator):
        """A classifier whose inputs are its probabilities."""

        classes_, is_fitted_ = list(range(5)), True

        def fit(self, x, y):
            return self

        def predict(self, x):
            return x.argmax(-1)

        def predict_proba(self, x):
            return x

    held_out, labels = of_classes(200)
    new, _ = of_classes(300)
    reference = mapie.SplitConformalClassifier(
        Given(), confidence_level=0.85, conformity_score=score, prefit=True, random_state=0
    )
    reference.conformalize(held_out.mean.double().numpy(), labels.numpy())
    _, expected = reference.predict_set(new.mean.double().numpy())
    sets = bnnify.ConformalSets.fit(held_out, labels, coverage=0.85, score=score)
    assert torch.equal(sets(new), torch.from_numpy(expected[:, :, 0]))


def test_intervals_are_those_of_mapie():
    score = pytest.importorskip("mapie.conformity_scores").StdConformityScore()
    prediction, y = of_numbers(99, told=0.5)
    std = prediction.total_std.double().numpy()
    scores = abs(score.get_signed_conformity_scores(y.double().numpy(), prediction.mean.double().numpy(), y_std=std))
    fitted = bnnify.ConformalIntervals.fit(prediction, y, coverage=0.9)
    assert fitted.factor == pytest.approx(sorted(scores)[89], rel=1e-12)  # the 90th of 99 + 1


def test_sets_of_the_surest_inputs_have_one_class_under_aps():
    held_out, labels = of_classes(500, told=5.0)
    sets = bnnify.ConformalSets.fit(held_out, labels, coverage=0.5, score="aps")
    assert sets(held_out).sum(-1).min() == 1
    saturated = classified(torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0]]))
    assert sets(saturated).tolist() == [[True, False, False, False, False]]
    yes = torch.rand(200)
    assert bnnify.ConformalSets.fit(answered(yes), (yes > 0.5).long())(answered(yes)).shape == (200, 2)


@pytest.mark.parametrize(
    ("number", "coverage", "enough"), [(8, 0.9, False), (9, 0.9, True), (98, 0.99, False), (99, 0.99, True)]
)
def test_too_few_data_are_told_with_how_many_it_takes(number, coverage, enough):
    if enough:
        bnnify.ConformalSets.fit(*of_classes(number), coverage=coverage)
        bnnify.ConformalIntervals.fit(*of_numbers(number), coverage=coverage)
        return
    for kind, data in ((bnnify.ConformalSets, of_classes), (bnnify.ConformalIntervals, of_numbers)):
        with pytest.raises(bnnify.ArgumentError, match=rf"{number} data are too few.*at least {number + 1}"):
            kind.fit(*data(number), coverage=coverage)


def test_what_could_not_be_promised_is_refused():
    prediction, labels = of_classes(20)
    regression, y = of_numbers(20)
    with pytest.raises(bnnify.ArgumentError, match=r"score\) must be 'lac' or 'aps', not 'raps'"):
        bnnify.ConformalSets.fit(prediction, labels, score="raps")
    with pytest.raises(bnnify.ArgumentError, match=r"coverage\) must be a number between 0 and 1, not 90"):
        bnnify.ConformalSets.fit(prediction, labels, coverage=90)
    pixels = classified(torch.full((20, 3, 4), 1 / 3), class_dim=-2)
    with pytest.raises(bnnify.ArgumentError, match=r"shape \(20, 4, 3\): pixels or tokens"):
        bnnify.ConformalSets.fit(pixels, torch.zeros(20, 4))
    with pytest.raises(bnnify.ArgumentError, match="take ConformalIntervals"):
        bnnify.ConformalSets.fit(regression, y)
    with pytest.raises(bnnify.ArgumentError, match="Of classes take ConformalSets"):
        bnnify.ConformalIntervals.fit(prediction, labels)
    with pytest.raises(bnnify.ArgumentError, match=r"targets of shape \(20, 1\) for a mean of shape \(20,\)"):
        bnnify.ConformalIntervals.fit(regression, y[:, None])
    with pytest.raises(bnnify.ArgumentError, match="not finite"):
        bnnify.ConformalIntervals.fit(regression, y / 0)
    with pytest.raises(bnnify.ArgumentError, match=r"one number for each example.*\(20, 2\)"):
        bnnify.ConformalIntervals.fit(Prediction(torch.zeros(20, 2), torch.zeros(20, 2), 1), torch.zeros(20, 2))
    with pytest.raises(bnnify.ArgumentError, match="total_std must be positive"):
        bnnify.ConformalIntervals.fit(Prediction(y, 0 * y, 1, aleatoric_std=0 * y), y)
    with pytest.raises(bnnify.ArgumentError, match="fitted on a prediction with known noise, and this one is without"):
        bnnify.ConformalIntervals.fit(regression, y)(Prediction(y, y, 1))
