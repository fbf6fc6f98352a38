"""The point posterior: the network itself, trained by maximum likelihood or a posteriori with the same call."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnnify
from tests import zoo

PRIORS = (
    bnnify.Gaussian(mean=0.1, std=0.5),
    bnnify.Laplace(mean=-0.2, scale=0.3),
    bnnify.ScaleMixture(pi=0.25, std1=1.0, std2=0.05),
    bnnify.Pretrained(std=0.2),
    bnnify.Pretrained(),
)


def network():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def data():
    return torch.randn(12, 4, dtype=torch.float64), torch.randint(3, (12,))


def trained(model, loss, **options):
    """The parameters after a few steps of SGD with momentum on ``loss``, a function of the model."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, **options)
    for _ in range(20):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in parameters]


@pytest.mark.parametrize("name", ["lstm", "tied_language_model", "partly_frozen", "checkpointed"])
def test_every_model_is_itself_and_learns_as_it_would(name):
    model, inputs = zoo.build(name)
    bnn = bnnify.convert(model, prior=bnnify.Gaussian(), posterior=bnnify.Point())
    names = [name for name, _ in bnn.module.named_parameters()]
    assert names == [name for name, _ in model.named_parameters()]
    assert all("point" in entry.settings and entry.added_memory == 0 for entry in bnn.report.bayesian)
    torch.manual_seed(1)
    expected = model(*inputs)
    torch.manual_seed(1)
    output, penalty = bnn(*inputs)
    assert zoo.equal(output, expected)
    zoo.loss(expected).backward()
    zoo.loss(output).backward()
    for one, other in zip(bnn.parameters(), model.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or zoo.equal(one.grad, other.grad)
    assert penalty.ndim == 0
    assert {id(p) for group in bnn.parameter_groups(lr=0.1) for p in group["params"]} == {
        id(p) for p in bnn.parameters() if p.requires_grad
    }


@pytest.mark.parametrize("prior", PRIORS, ids=str)
def test_the_penalty_is_minus_the_log_density_of_the_weights(prior):
    model = network()
    bnn = bnnify.convert(model, prior=prior, posterior=bnnify.Point())
    with torch.no_grad():
        for parameter in bnn.module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    expected = torch.zeros((), dtype=torch.float64)
    for name, parameter in model.named_parameters():
        weights = bnn.module.get_parameter(name)
        std = 0.04 * parameter.detach().square().mean().sqrt()
        density = {
            bnnify.Gaussian: lambda: torch.distributions.Normal(0.1, 0.5),
            bnnify.Laplace: lambda: torch.distributions.Laplace(-0.2, 0.3),
            bnnify.ScaleMixture: lambda: torch.distributions.MixtureSameFamily(
                torch.distributions.Categorical(torch.tensor([0.25, 0.75], dtype=torch.float64)),
                torch.distributions.Normal(torch.zeros(2), torch.tensor([1.0, 0.05], dtype=torch.float64)),
            ),
            bnnify.Pretrained: lambda p=parameter, s=std: torch.distributions.Normal(p.detach(), prior.std or s),
        }[type(prior)]()
        expected -= density.log_prob(weights).sum()
    torch.testing.assert_close(bnn.kl(), expected)


def test_a_gaussian_prior_is_weight_decay():
    model, (x, y), num_data, std = network(), data(), 12, 0.7
    bnn = bnnify.convert(model, prior=bnnify.Gaussian(std=std), posterior=bnnify.Point())

    def posterior(bnn):
        output, penalty = bnn(x)
        return bnnify.elbo(F.cross_entropy(output, y), penalty, num_data)

    a_posteriori = trained(bnn, posterior)
    decayed = trained(
        copy.deepcopy(model), lambda model: F.cross_entropy(model(x), y), weight_decay=1 / (num_data * std**2)
    )
    torch.testing.assert_close(a_posteriori, decayed)
    plain = trained(copy.deepcopy(model), lambda model: F.cross_entropy(model(x), y))
    assert (plain[0] - decayed[0]).abs().max() > 1e-2


def test_a_part_of_the_model_may_be_a_point():
    model, (x, _) = network(), data()
    bnn = bnnify.convert(model, prior=bnnify.Gaussian(), posterior={"0": bnnify.Point()})
    assert set(bnn.module.state_dict()) == {*model.state_dict(), "2.weight_rho", "2.bias_rho"}
    with bnn.draw():
        assert torch.equal(bnn.module[0].weight, model[0].weight)
        assert not torch.equal(bnn.module[2].weight, model[2].weight)
    prediction = bnn.predict(x, num_samples=3)
    assert prediction.std.all()
    bnnify.convert(model, posterior=bnnify.Point()).predict(x, num_samples=3)


def test_files_copies_and_the_way_back_work_without_a_rho(tmp_path):
    model, (x, _) = network(), data()
    bnn = bnnify.convert(model, prior=bnnify.Gaussian(std=0.3), posterior=bnnify.Point())
    bnnify.save(bnn, tmp_path / "map.pt")
    loaded = bnnify.load(tmp_path / "map.pt", network())
    for other in (loaded, copy.deepcopy(bnn)):
        assert torch.equal(other(x)[0], bnn(x)[0])
        assert torch.equal(other.kl(), bnn.kl())
    assert not [name for name in loaded.module.state_dict() if name.endswith("_rho")]
    assert zoo.equal(bnnify.collapse(bnn)(x), model(x))
    assert "_rho" not in str(vars(bnnify.collapse(bnn)[0])["_parameters"].keys())
    bnnify.load_weights(bnn, network().state_dict())


class NoDensity(bnnify.Prior):
    def kl(self, posterior):
        return posterior.mean.square()

    def __str__(self):
        return "NoDensity()"


@pytest.mark.parametrize(
    ("prior", "found"),
    [
        (NoDensity(), r"NoDensity\(\) does not know its density.*log_prob"),
        (bnnify.Gaussian(std="learned"), r"Gaussian.*no best scale.*Give it a number"),
        (bnnify.Laplace(scale="learned"), r"Laplace.*no best scale"),
        (bnnify.Pretrained(std="learned"), r"Pretrained.*no best scale"),
    ],
)
def test_a_prior_without_a_density_is_refused_at_conversion(prior, found):
    with pytest.raises(bnnify.ConversionError, match=found):
        bnnify.convert(network(), prior=prior, posterior=bnnify.Point())
