"""One table of likelihoods: predictions, what fits σ to data, and the losses agree on what an output means."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical, Normal

import bnnify
from bnnify.prediction.known_likelihoods import as_likelihood

OUTPUTS = {
    "logits": torch.randn(5, 3, dtype=torch.float64),
    "probabilities": torch.randn(5, 3, dtype=torch.float64).softmax(-1),
    "binary_logits": torch.randn(5, 3, dtype=torch.float64),
    "gaussian": (torch.randn(5, 3, dtype=torch.float64), torch.rand(5, 3, dtype=torch.float64) + 0.1),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_mean_variance_and_entropy_are_those_of_the_distribution(name):
    likelihood = as_likelihood(name)
    distribution, parts = likelihood.distribution(OUTPUTS[name]), likelihood.parts(OUTPUTS[name])
    mean = likelihood.mean(parts)
    expected = distribution.probs if isinstance(distribution, Categorical) else distribution.mean
    torch.testing.assert_close(mean, expected)
    if likelihood.variance(parts) is None:
        torch.testing.assert_close(likelihood.entropy(mean), distribution.entropy())
    else:
        torch.testing.assert_close(likelihood.variance(parts), distribution.variance)
        assert likelihood.entropy(mean) is None


def test_a_dimension_of_classes_is_meant_in_the_same_way_everywhere():
    logits, labels = torch.randn(5, 3, 2, 2, dtype=torch.float64), torch.randint(3, (5, 2, 2))
    likelihood = as_likelihood("logits", 1)
    expected = F.cross_entropy(logits, labels)
    torch.testing.assert_close(-likelihood.distribution(logits).log_prob(labels).mean(), expected)
    torch.testing.assert_close(bnnify.CategoricalNLL(class_dim=1)(logits, labels), expected)
    mean = likelihood.mean((logits,))
    torch.testing.assert_close(mean, logits.softmax(1))
    torch.testing.assert_close(likelihood.entropy(mean), likelihood.distribution(logits).entropy())


@pytest.mark.parametrize(
    ("name", "criterion", "target"),
    [
        ("logits", bnnify.CategoricalNLL(), torch.tensor([0, 1, 2, 0, 1])),
        ("binary_logits", bnnify.BernoulliNLL(), torch.ones(5, 3, dtype=torch.float64)),
        ("gaussian", bnnify.HeteroscedasticGaussianNLL(), torch.zeros(5, 3, dtype=torch.float64)),
    ],
)
def test_the_losses_are_those_of_the_likelihoods(name, criterion, target):
    log_prob = as_likelihood(name).distribution(OUTPUTS[name]).log_prob(target)
    torch.testing.assert_close(criterion(OUTPUTS[name], target), -log_prob.mean())


def test_of_a_function_predictions_have_the_mean_and_the_noise_of_its_distribution():
    torch.manual_seed(0)
    bnn = bnnify.convert(nn.Linear(4, 2))
    x = torch.randn(3, 4)
    torch.manual_seed(1)
    expected = bnn.predict(x, 4)
    torch.manual_seed(1)
    prediction = bnn.predict(x, 4, likelihood=lambda mean: Normal(mean, 0.5))
    assert torch.equal(prediction.mean, expected.mean)
    assert torch.equal(prediction.std, expected.std)
    torch.testing.assert_close(prediction.aleatoric_std, torch.full((3, 2), 0.5))
    assert prediction.predictive_entropy is None
    with pytest.raises(bnnify.ArgumentError, match="likelihood='logits'"):
        bnn.predict(x, 4, likelihood=lambda out: Categorical(logits=out))
    with pytest.raises(bnnify.ArgumentError, match=r"class_dim=1 is for.*'a function'"):
        bnn.predict(x, 4, likelihood=lambda mean: Normal(mean, 0.5), class_dim=1)


@pytest.mark.parametrize("function", [bnnify.BayesianModel.predict, bnnify.tune_std, bnnify.FisherStd.estimate])
def test_by_default_nothing_is_assumed_of_an_output(function):
    likelihood = inspect.signature(function).parameters["likelihood"]
    assert likelihood.default == "values"
    assert likelihood.kind is inspect.Parameter.KEYWORD_ONLY


def test_values_have_no_fisher_information():
    with pytest.raises(bnnify.ArgumentError, match=r"'values' does not tell how probable a target is.*Normal"):
        bnnify.FisherStd.estimate(nn.Linear(4, 2), [torch.randn(3, 4)], num_data=3, likelihood="values")


def test_probabilities_have_the_fisher_information_of_their_logits():
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), torch.randn(2000, 4)
    logits, probabilities = (
        bnnify.FisherStd.estimate(each, [x], num_data=2000, likelihood=likelihood).fisher
        for each, likelihood in ((model, "logits"), (nn.Sequential(model, nn.Softmax(-1)), "probabilities"))
    )
    torch.testing.assert_close(probabilities["0.weight"], logits["weight"], rtol=0.2, atol=1e-2)
