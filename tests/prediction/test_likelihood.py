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
    for likelihood in (name, criterion):
        log_prob = as_likelihood(likelihood).distribution(OUTPUTS[name]).log_prob(target)
        torch.testing.assert_close(criterion(OUTPUTS[name], target), -log_prob.mean())


@pytest.mark.parametrize("std", [0.5, torch.tensor([0.5, 2.0])])
def test_an_nll_module_says_the_noise_that_it_has_learned(std):
    nll = bnnify.GaussianNLL(std=std, learned=True)
    model, x, y = nn.Linear(4, 2), torch.randn(300, 4), torch.randn(300, 2)
    nn.init.constant_(nll.log_std, -1.0)  # as training would
    log_prob = as_likelihood(nll).distribution(y + 0.1).log_prob(y)
    torch.testing.assert_close(-log_prob.mean(), nll(y + 0.1, y).detach())
    prediction = bnnify.convert(model).predict(x, 4, likelihood=nll)
    torch.testing.assert_close(prediction.aleatoric_std, nll.std.detach().expand(300, 2))

    def normal(mean):
        return Normal(mean, nll.std.detach())

    tuned = [bnnify.tune_std(bnnify.convert(model), [(x, y)], likelihood=each) for each in (nll, normal)]
    assert tuned[0] == tuned[1]
    fisher = bnnify.FisherStd.estimate(model, [x], num_data=300, likelihood=nll).fisher["bias"]
    torch.testing.assert_close(fisher, 1 / nll.std.detach().square().expand(2), rtol=0.3, atol=0)
    rule = bnnify.ResponseStd(x, likelihood=nll)
    assert "KL from the mean network" in bnnify.convert(model, posterior_std=rule).report.tuning


def test_an_nll_of_classes_says_where_they_are_and_what_does_not_count():
    bnn = bnnify.convert(nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (3, 2))))
    x, labels = torch.randn(50, 4), torch.randint(3, (50, 2))
    labels[:, 1] = 255
    nll = bnnify.CategoricalNLL(class_dim=1, ignore_index=255)
    assert bnn.predict(x, 4, likelihood=nll).mean.sum(1).allclose(torch.ones(50, 2))
    assert bnnify.tune_std(bnn, [(x, labels)], likelihood=nll).num_data == 50
    assert bnnify.tune_std(bnn, [(x, labels % 255)], likelihood=nll, ignore_index=-100).num_data == 100


def test_a_loss_that_is_not_of_bnnify_is_no_likelihood():
    with pytest.raises(bnnify.ArgumentTypeError, match=r"function of the output alone.*bnnify\.GaussianNLL"):
        bnnify.convert(nn.Linear(4, 2)).predict(torch.randn(3, 4), likelihood=nn.MSELoss())
    nll = bnnify.GaussianNLL(std=torch.ones(3))
    with pytest.raises(bnnify.ArgumentError, match=r"std of shape \(3,\), which does not broadcast to the output"):
        bnnify.convert(nn.Linear(4, 2)).predict(torch.randn(3, 4), likelihood=nll)


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
