"""The metrics of a report are those of scikit-learn and torchmetrics, and of their definitions."""

import math

import pytest
import torch
from torch.distributions import Categorical, Normal

from bnnify.analysis.bootstrap import compared, separated
from bnnify.analysis.metrics import METRICS_OF_CLASSES, METRICS_OF_NUMBERS, columns_of, reliability, risks
from bnnify.analysis.outcomes import Outcomes
from bnnify.prediction import Prediction
from tests.decisions.predictions import answered, classified

N = 400


def classification():
    logits = 2 * torch.randn(N, 5, dtype=torch.float64)
    prediction, labels = classified(logits.softmax(-1)), Categorical(logits=logits / 2).sample()
    log_prob = prediction.mean.double().log()[torch.arange(N), labels]
    return Outcomes(prediction, labels, log_prob, torch.arange(N)), prediction.mean, labels


def regression():
    mean, epistemic, noise = torch.randn(N), 0.3 * torch.rand(N), torch.rand(N) + 0.1
    total = (epistemic**2 + noise**2).sqrt()
    y = mean + total * torch.randn(N)
    outcomes = Outcomes(
        Prediction(mean, epistemic, 8, aleatoric_std=noise), y, Normal(mean, total).log_prob(y), torch.arange(N)
    )
    return outcomes, Normal(mean.double(), total.double()), y.double()


def test_of_classes_they_are_those_of_the_libraries():
    sklearn = pytest.importorskip("sklearn.metrics")
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification")
    outcomes, probabilities, labels = classification()
    columns, _ = columns_of(outcomes)
    found = {name: metric(columns) for name, metric in METRICS_OF_CLASSES.items()}
    assert found["accuracy"] == pytest.approx(sklearn.accuracy_score(labels, probabilities.argmax(-1)))
    assert found["NLL"] == pytest.approx(sklearn.log_loss(labels, probabilities.double()), rel=1e-5)
    assert found["Brier score"] == pytest.approx(
        (probabilities - torch.eye(5)[labels]).square().sum(-1).mean().item(), rel=1e-5
    )
    ece = torchmetrics.multiclass_calibration_error(probabilities, labels, num_classes=5, n_bins=15)
    assert found["ECE"] == pytest.approx(ece.item(), rel=1e-4)


def test_of_yes_and_no_they_are_those_of_the_answer():
    sklearn = pytest.importorskip("sklearn.metrics")
    yes, labels = torch.rand(N), torch.randint(2, (N,))
    log_prob = torch.where(labels == 1, yes, 1 - yes).double().log()
    columns, _ = columns_of(Outcomes(answered(yes), labels, log_prob, torch.arange(N)))
    found = {name: metric(columns) for name, metric in METRICS_OF_CLASSES.items()}
    assert found["Brier score"] == pytest.approx(sklearn.brier_score_loss(labels, yes), rel=1e-5)
    assert found["accuracy"] == pytest.approx(((yes > 0.5) == labels).float().mean().item())


def test_adaptive_ece_and_aurc_are_those_of_their_definitions():
    outcomes, probabilities, labels = classification()
    columns, _ = columns_of(outcomes)
    confidence, answers = probabilities.double().max(-1)
    order = confidence.argsort(descending=True).tolist()
    wrong = (answers != labels).tolist()
    risk = [sum(wrong[i] for i in order[:k]) / k for k in range(1, N + 1)]
    torch.testing.assert_close(risks(columns), torch.tensor(risk, dtype=torch.float64))
    assert METRICS_OF_CLASSES["AURC"](columns) == pytest.approx(sum(risk) / N)
    bins = torch.tensor(order).tensor_split(15)
    gaps = [abs(sum(confidence[i].item() - (not wrong[i]) for i in each.tolist())) / N for each in bins]
    assert METRICS_OF_CLASSES["adaptive ECE"](columns) == pytest.approx(sum(gaps))
    told, accuracy, share = reliability(columns)
    ece = (share * (told - accuracy).abs()).nansum().item()
    assert METRICS_OF_CLASSES["ECE"](columns) == pytest.approx(ece, rel=1e-4)


def test_of_numbers_they_are_those_of_the_gaussian():
    outcomes, normal, y = regression()
    columns, _ = columns_of(outcomes)
    found = {name: metric(columns) for name, metric in METRICS_OF_NUMBERS.items()}
    assert found["RMSE"] == pytest.approx((y - normal.mean).square().mean().sqrt().item(), rel=1e-5)
    assert found["NLL"] == pytest.approx(-normal.log_prob(y).mean().item(), rel=1e-5)
    low, high = outcomes.prediction.interval(0.9)
    assert found["90 % coverage"] == pytest.approx(((low <= y) & (y <= high)).float().mean().item())
    assert found["90 % width"] == pytest.approx((high - low).mean().item(), rel=1e-5)
    grid = torch.linspace(-12, 12, 20_001, dtype=torch.float64)[:, None]
    integral = (normal.cdf(grid) - (grid >= y).double()).square().sum(0) * (grid[1] - grid[0])
    assert found["CRPS"] == pytest.approx(integral.mean().item(), rel=1e-3)


def test_scores_are_separated_as_scikit_learn_says_ties_included():
    sklearn = pytest.importorskip("sklearn.metrics")
    scores = {"score": (torch.randn(300).round(decimals=1), 0.7 + torch.randn(200).round(decimals=1))}
    inside, outside = scores["score"]
    found = separated(scores, (torch.arange(300), torch.arange(200)), times=0, seed=0)["score"]
    foreign = torch.cat([torch.zeros(300), torch.ones(200)])
    assert found["AUROC"].value == pytest.approx(sklearn.roc_auc_score(foreign, torch.cat(scores["score"])))
    threshold = min(t for t in inside.tolist() if (inside <= t).float().mean() >= 0.95)
    assert found["FPR95"].value == pytest.approx((outside <= threshold).float().mean().item())


def test_intervals_are_as_wide_as_theory_says_and_follow_the_seed():
    outcomes, *_ = classification()
    rows = {"row": columns_of(outcomes)}
    metrics = {"accuracy": METRICS_OF_CLASSES["accuracy"]}
    found = compared(rows, metrics, times=2000, seed=0)[0]["row"]["accuracy"]
    expected = 2 * 1.96 * math.sqrt(found.value * (1 - found.value) / N)
    assert found.high - found.low == pytest.approx(expected, rel=0.1)
    again, other = (compared(rows, metrics, times=50, seed=seed)[0] for seed in (0, 1))
    assert again == compared(rows, metrics, times=50, seed=0)[0]
    assert again != other


def test_rows_are_compared_on_the_same_resamples():
    outcomes, *_ = classification()
    sharper = classified(outcomes.prediction.mean.pow(1.05) / outcomes.prediction.mean.pow(1.05).sum(-1, keepdim=True))
    log_prob = sharper.mean.double().log()[torch.arange(N), outcomes.targets]
    rows = {
        "one": columns_of(outcomes),
        "other": columns_of(Outcomes(sharper, outcomes.targets, log_prob, torch.arange(N))),
    }
    metrics = {"NLL": METRICS_OF_CLASSES["NLL"], "accuracy": METRICS_OF_CLASSES["accuracy"]}
    values, differences = compared(rows, metrics, times=200, seed=0)
    one, other, difference = values["one"]["NLL"], values["other"]["NLL"], differences["other"]["NLL"]
    assert difference.value == pytest.approx(other.value - one.value)
    assert difference.high - difference.low < 0.2 * (one.high - one.low)
    assert (differences["other"]["accuracy"].low, differences["other"]["accuracy"].high) == (0, 0)


def test_the_data_of_one_example_are_drawn_together():
    outcomes, *_ = classification()
    columns, examples = columns_of(outcomes)
    twice = {name: column.repeat_interleave(4) for name, column in columns.items()}
    metrics = {"accuracy": METRICS_OF_CLASSES["accuracy"]}
    one = compared({"row": (columns, examples)}, metrics, times=50, seed=0)
    assert compared({"row": (twice, examples.repeat_interleave(4))}, metrics, times=50, seed=0) == one
