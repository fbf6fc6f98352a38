"""Under ``torch.set_default_device`` everything works on the tensors that it was given, as without it.

The default here is "meta", which has no numbers: what is made there by mistake cannot pass for anything else.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnnify
from bnnify.modules.parameters import unique_bayesian_parameters
from tests import zoo

torch.manual_seed(0)
X, Y = torch.randn(64, 6), torch.randint(3, (64,))
LOADER = [(X[:32], Y[:32]), (X[32:], Y[32:])]
ESTIMATORS = ("reparameterization", "local", "flipout")


@pytest.fixture
def network():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


@pytest.fixture
def elsewhere(network):
    """The default device is another one, from when the network has been made."""
    with torch.device("meta"):
        yield


def train(bnn):
    torch.manual_seed(0)
    output, kl = bnn(X)
    bnnify.elbo(F.cross_entropy(output, Y), kl, num_data=64).backward()
    return [p.grad for p in bnn.parameters() if p.requires_grad]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_step_of_training_is_the_same(network, estimator):
    convert = {"estimator": estimator, "posterior_std": 0.1}
    wanted = train(bnnify.convert(network, **convert))
    with torch.device("meta"):
        found = train(bnnify.convert(network, **convert))
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", sorted(set(zoo.ZOO) - {"unrolled"}))
def test_conversion_and_prediction_are_the_same_over_the_zoo(name):
    model, inputs = zoo.build(name)
    bnn = bnnify.convert(model)
    options = {"num_samples": 2, "seed": 3, "output": lambda out: zoo.tensors(out)[0]}
    wanted = bnn.predict(inputs, **options)
    with torch.device("meta"):
        other = bnnify.convert(model)
        found = other.predict(inputs, **options)
    torch.testing.assert_close(found.mean, wanted.mean)  # attention leaves its fast path under torch's own mode
    torch.testing.assert_close(found.std, wanted.std)


@pytest.mark.parametrize(
    "options",
    [{}, {"antithetic": True}, {"networks_at_once": 2}, {"closed_form": True, "num_samples": 50}],
    ids=["plain", "antithetic", "at once", "closed form"],
)
@pytest.mark.parametrize("batches", [False, True])
def test_every_way_of_prediction(network, options, batches):
    select = "2" if "closed_form" in options else None
    bnn = bnnify.convert(network, select=select)
    options = {"num_samples": 4, "seed": 3, "likelihood": "logits"} | options
    inputs = [X[:30], X[30:]] if batches else X
    wanted = bnn.predict(inputs, **options)
    with torch.device("meta"):
        found = bnn.predict(inputs, **options)
    assert torch.equal(found.mean, wanted.mean)
    assert torch.equal(found.predictive_entropy, wanted.predictive_entropy)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("ending", ["bnn.pt", "safetensors"])
def test_files(network, tmp_path, ending):
    pytest.importorskip("safetensors")
    bnn = bnnify.convert(network, prior=bnnify.Gaussian(std=0.1))
    bnnify.save(bnn, tmp_path / f"model.{ending}")
    loaded = bnnify.load(tmp_path / f"model.{ending}", copy.deepcopy(network))
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in bnn.state_dict().items())
    torch.save(network.state_dict(), tmp_path / "plain.pt")
    assert bnnify.convert_checkpoint(tmp_path / "plain.pt", lambda: network).kl().device.type == "cpu"


@pytest.mark.usefixtures("elsewhere")
def test_what_is_done_with_a_converted_model(network):
    bnn = bnnify.convert(network)
    tuned = bnnify.tune_std(bnn, LOADER, likelihood="logits", num_samples=4, per_layer=True)
    assert tuned.factors.keys() == {"0", "2"}
    bnnify.tune_std(bnn, LOADER, likelihood="logits", num_samples=4, labels=False)
    report = bnnify.evaluate(bnn, LOADER, num_samples=4, likelihood="logits", out_of_distribution=[X + 9])
    assert report.rows.keys() == {"posterior mean", "networks"}
    prediction = bnn.predict(X, 8, likelihood="logits", seed=0)
    assert bnnify.Temperature.fit(prediction, Y).temperature > 0
    assert bnnify.Abstention.fit(prediction, prediction.mean.argmax(-1), risk=0.1) is not None
    posteriors = bnnify.convert(network, prior=bnnify.posterior_of(bnn))
    assert posteriors.kl().item() == pytest.approx(0.0, abs=1e-3)
    bnnify.prune(bnn, 0.5)
    assert bnnify.audit(bnn, X) is not None
    assert all(p.device.type == "cpu" for p in bnnify.freeze(bnn, 2).parameters())
    assert all(p.device.type == "cpu" for p in bnnify.collapse(bnn).parameters())


@pytest.mark.usefixtures("elsewhere")
def test_an_exported_file(network, tmp_path):
    """It is loaded and compared with the networks where it is written."""
    bnn = bnnify.convert(network, posterior_std=0.1)
    assert bnnify.export(bnn, tmp_path / "model.pt2", X, num_samples=2).max_difference < 1e-5


def test_a_program_of_another(network, tmp_path):
    torch.export.save(torch.export.export(network, (X,)), tmp_path / "program.pt2")
    with torch.device("meta"):
        bnn = bnnify.convert_checkpoint(tmp_path / "program.pt2")
        assert torch.equal(bnn.module(X), network(X))


@pytest.mark.usefixtures("elsewhere")
def test_rules_for_std(network):
    fisher = bnnify.FisherStd.estimate(network, LOADER, likelihood="logits", num_data=64)
    for rule in (bnnify.ResponseStd(LOADER), fisher, bnnify.Moped(0.1), bnnify.Relative(0.1)):
        bnn = bnnify.convert(network, posterior_std=rule)
        assert all(p.rho.device.type == "cpu" for p in unique_bayesian_parameters(bnn.module))


@pytest.mark.usefixtures("elsewhere")
def test_likelihoods_and_posteriors(network):
    for posterior in (bnnify.MeanField(), bnnify.Point()):
        bnn = bnnify.convert(network, posterior=posterior, prior=bnnify.Gaussian())
        output, kl = bnn(X)
        assert torch.isfinite(bnnify.CategoricalNLL()(output, Y) + kl)
    assert torch.isfinite(bnnify.avuc_loss(output.softmax(-1), Y, threshold=0.5))
