"""Targets of tune_std: ignored, bool, empty and uneven ones count as they should; what does not fit is refused."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Bernoulli, Categorical, Independent, Normal

import bnnify
from bnnify.training.targets import log_prob_of

LOGITS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


def factor(data, outputs=3, **options):
    torch.manual_seed(0)
    return bnnify.tune_std(
        bnnify.convert(nn.Linear(4, outputs)), data, **{"num_samples": 4, "likelihood": "logits", **options}
    ).factor


@pytest.mark.parametrize("ignore_index", [-100, 255, 1])
def test_ignored_classes_do_not_count(ignore_index):
    labels = LABELS.masked_fill(LABELS == 1, ignore_index)
    found = log_prob_of(labels, Categorical(logits=LOGITS), ignore_index)
    assert len(found) == 4
    expected = F.cross_entropy(LOGITS, labels, ignore_index=ignore_index)
    torch.testing.assert_close(-found.mean().float(), expected)


def test_ignored_answers_do_not_count():
    answers = torch.tensor([1.0, 0.0, -100.0])
    found = log_prob_of(answers, Bernoulli(logits=LOGITS[0]))
    torch.testing.assert_close(found.float(), Bernoulli(logits=LOGITS[0, :2]).log_prob(answers[:2]))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64])
def test_answers_and_classes_may_have_any_dtype(dtype):
    answers = LABELS.clamp(max=1)
    for distribution in Categorical(logits=LOGITS), Bernoulli(logits=LOGITS[:, 0]):
        expected = distribution.log_prob(answers.float()).double()
        torch.testing.assert_close(log_prob_of(answers.to(dtype), distribution), expected)


def test_what_is_ignored_or_empty_has_no_say():
    some = X[:4], LABELS[:4]
    expected = factor([some])
    ignored = (X, LABELS.index_fill(0, torch.tensor([4, 5]), -100))
    assert factor([some, (X[:0], LABELS[:0])]) == pytest.approx(expected)
    assert factor([(X[:0], LABELS[:0]), some]) == pytest.approx(expected)
    assert math.isfinite(factor([ignored]))
    assert math.isfinite(factor([(X[:5], LABELS[:5]), (X[5:], LABELS[5:])]))


@pytest.mark.parametrize("data", [[(X, LABELS * 0 - 100)], [(X[:0], LABELS[:0])]], ids=["ignored", "empty"])
def test_without_a_target_that_counts_there_is_nothing_to_tune(data):
    with pytest.raises(ValueError, match="no target counts"):
        factor(data)


@pytest.mark.parametrize(
    ("distribution", "shape"),
    [
        (Normal(torch.zeros(6, 1), 1.0), (6,)),
        (Normal(torch.zeros(6), 1.0), (6, 1)),
        (Normal(torch.zeros(6, 1), 1.0), (1,)),
        (Bernoulli(logits=torch.zeros(6, 1)), (6,)),
        (Categorical(logits=LOGITS), (6, 1)),
        (Categorical(logits=LOGITS), (6, 3)),
        (Categorical(logits=LOGITS), ()),
        (Independent(Normal(torch.zeros(6, 2), 1.0), 1), (6,)),
    ],
    ids=["N against N x 1", "N x 1 against N", "one", "answers", "classes", "one-hot", "a number", "vectors"],
)
def test_shapes_that_would_broadcast_are_refused(distribution, shape):
    with pytest.raises(ValueError, match=r"shape .*Make them alike: reshape the target.*out.squeeze\(-1\)"):
        log_prob_of(torch.zeros(shape), distribution)


@pytest.mark.parametrize(("likelihood", "outputs"), [("binary_logits", 1), (lambda f: Normal(f, 0.3), 1)])
def test_one_output_for_each_example_takes_targets_of_its_shape_alone(likelihood, outputs):
    answers = (X[:, :1] > 0).float()
    assert factor([(X, answers)], outputs, likelihood=likelihood) > 0
    with pytest.raises(ValueError, match=r"the shape \(6,\), and what the output predicts .* has the shape \(6, 1\)"):
        factor([(X, answers[:, 0])], outputs, likelihood=likelihood)
    assert factor([(X, answers[:, 0])], outputs, likelihood=likelihood, output=lambda out: out.squeeze(-1)) > 0


@pytest.mark.parametrize(
    ("target", "match"),
    [
        (LABELS + 1, "class numbers from 0 to 2, and one is 3"),
        (LABELS - 1, "class numbers from 0 to 2, and one is -1"),
        (LABELS + 0.5, r"class numbers from 0 to 2, and one is 0\.5"),
        (LABELS * math.nan, "class numbers from 0 to 2, and one is nan"),
    ],
)
def test_targets_that_are_no_classes_are_refused(target, match):
    with pytest.raises(ValueError, match=match):
        factor([(X, target)])


def test_targets_that_are_no_answers_are_refused():
    with pytest.raises(ValueError, match=r"0 or 1, and one is 0\.25"):
        factor([(X, torch.full((6, 1), 0.25))], 1, likelihood="binary_logits")


def test_targets_of_classes_are_tensors():
    with pytest.raises(TypeError, match=r"a target must be a tensor, not a list of 6.*torch.as_tensor"):
        factor([(X, LABELS.tolist())])


def test_only_classes_and_answers_can_be_ignored():
    with pytest.raises(ValueError, match="ignore_index=0 is for targets that are classes or yes/no answers"):
        factor([(X, X[:, :1])], 1, likelihood=lambda f: Normal(f, 1.0), ignore_index=0)


def test_a_size_of_σ_under_which_nothing_is_finite_is_passed_over():
    class Overflows(nn.Linear):
        def forward(self, x):
            out = super().forward(x)
            return out.masked_fill(out.abs().amax() > 2, torch.nan)

    torch.manual_seed(0)
    model = Overflows(4, 3)
    with torch.no_grad():
        model.weight *= 0.1
    assert math.isfinite(
        bnnify.tune_std(bnnify.convert(model), [(X, LABELS)], num_samples=4, likelihood="logits").factor
    )
