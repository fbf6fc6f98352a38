"""Arguments of a wrong type are refused by name, with what was found and, where it helps, what to pass."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import bnnify

ONE = torch.tensor(1.0)
LOADER = DataLoader(torch.zeros(6, 4), 2)
LABELS = torch.tensor([0, 1, 2])
PROBABILITIES = torch.full((3, 3), 1 / 3)


def converted():
    return bnnify.convert(nn.Linear(4, 3))


def tuned(**options):
    return bnnify.tune_std(converted(), [(torch.zeros(3, 4), LABELS)], **{"likelihood": "logits", **options})


def estimated(**options):
    return bnnify.FisherStd.estimate(
        nn.Linear(4, 3), [torch.zeros(3, 4)], **{"num_data": 3, "likelihood": "logits", **options}
    )


def from_adam(model=None, **options):
    options = {"num_data": 3, "batch_size": 1, **options}
    return bnnify.FisherStd.from_adam(model or nn.Linear(4, 3), torch.optim.Adam([torch.zeros(1)]), **options)


CALLS = {
    "elbo(nll)": (lambda: bnnify.elbo(0.5, ONE, 10), r"elbo\(nll\) must be a tensor, not 0.5.*cross_entropy"),
    "elbo(integers)": (lambda: bnnify.elbo(LABELS.sum(), ONE, 10), r"elbo\(nll\) must hold real numbers.*int64"),
    "elbo(kl)": (lambda: bnnify.elbo(ONE, converted(), 10), r"elbo\(kl\) must be a tensor.*output, kl = bnn\(x\)"),
    "elbo(pair)": (lambda: bnnify.elbo(ONE, (ONE, ONE), 10), r"elbo\(kl\) must be a tensor, not a tuple of 2"),
    "elbo(loader)": (lambda: bnnify.elbo(ONE, ONE, LOADER), r"num_data\) must be.*DataLoader.*len\(loader.dataset\)"),
    "elbo(None)": (lambda: bnnify.elbo(ONE, ONE, None), r"num_data\) must be a number, not None"),
    "elbo(tensors)": (lambda: bnnify.elbo(ONE, ONE, torch.ones(2)), r"a Tensor of shape \(2,\)"),
    "elbo(beta)": (lambda: bnnify.elbo(ONE, ONE, 10, "1"), r"elbo\(beta\) must be a number, not the string '1'"),
    "linear_warmup": (lambda: bnnify.linear_warmup(None, 4), r"linear_warmup\(step\)"),
    "linear_warmup(steps)": (lambda: bnnify.linear_warmup(1, LOADER), r"linear_warmup\(warmup_steps\)"),
    "linear_warmup(final)": (lambda: bnnify.linear_warmup(1, 4, "1"), r"linear_warmup\(final\)"),
    "geometric_weight": (lambda: bnnify.geometric_weight(ONE.expand(2), 4), r"batch\).*enumerate\(loader\)"),
    "geometric_weight(loader)": (lambda: bnnify.geometric_weight(0, LOADER), r"num_batches\).*len\(loader\)"),
    "CategoricalNLL": (lambda: bnnify.CategoricalNLL()((PROBABILITIES, ONE), LABELS), "output must be .* tuple of 2"),
    "CategoricalNLL(target)": (lambda: bnnify.CategoricalNLL()(PROBABILITIES, [0, 1, 2]), "target must be a tensor"),
    "CategoricalNLL(class_dim)": (lambda: bnnify.CategoricalNLL("1"), r"class_dim\) must be an integer"),
    "CategoricalNLL(ignore)": (lambda: bnnify.CategoricalNLL(ignore_index=None), r"ignore_index\) must be an integer"),
    "BernoulliNLL": (lambda: bnnify.BernoulliNLL()(0.5, ONE), "BernoulliNLL: the output must be a tensor"),
    "GaussianNLL": (lambda: bnnify.GaussianNLL(1.0)(ONE, 0.5), "GaussianNLL: the target must be a tensor"),
    "GaussianNLL(std)": (lambda: bnnify.GaussianNLL("1"), r"GaussianNLL\(std\) must be a number.*tensor too"),
    "HeteroscedasticGaussianNLL": (lambda: bnnify.HeteroscedasticGaussianNLL()((ONE, ONE), None), "target must be"),
    "avuc_loss": (lambda: bnnify.avuc_loss(None, LABELS, 0.5), r"AvUC: the probabilities.*sample"),
    "avuc_loss(labels)": (lambda: bnnify.avuc_loss(PROBABILITIES, [0, 1, 2], 0.5), "AvUC: the labels"),
    "avuc_loss(threshold)": (lambda: bnnify.avuc_loss(PROBABILITIES, LABELS, None), "uncertainty_threshold gives one"),
    "avuc_loss(uncertainty)": (lambda: bnnify.avuc_loss(PROBABILITIES, LABELS, 0.5, 0.1), "AvUC: the uncertainty"),
    "uncertainty_threshold": (lambda: bnnify.uncertainty_threshold(PROBABILITIES, None), "AvUC: the labels"),
    "collapse": (lambda: bnnify.collapse({}), r"collapse\(model\) must be a torch.nn.Module, not a dict"),
    "prune": (lambda: bnnify.prune({}, 0.5), "must be a torch.nn.Module, not a dict"),
    "signal_to_noise": (lambda: bnnify.signal_to_noise(None), "must be a torch.nn.Module, not None"),
    "tune_std": (
        lambda: bnnify.tune_std(nn.Linear(4, 3), [], likelihood="logits"),
        "takes a converted model.*not a Linear",
    ),
    "tune_std(seed)": (lambda: tuned(seed=None), r"tune_std\(seed\) must be an integer"),
    "tune_std(ignore_index)": (lambda: tuned(ignore_index=1.5), r"ignore_index\) must be an integer"),
    "audit": (lambda: bnnify.audit(nn.Linear(4, 3), torch.zeros(1, 4)), "audit takes a converted model.*not a Linear"),
    "audit(x)": (lambda: bnnify.audit(converted(), LOADER), r"Linear, called with \(a DataLoader\)"),
    "audit(optimizer)": (lambda: bnnify.audit(converted(), optimizer=0.1), r"audit\(optimizer\) takes a torch.optim"),
    "sample": (lambda: converted().sample(LOADER, num_samples=2), r"Linear, called with \(a DataLoader\)"),
    "FisherStd": (lambda: bnnify.FisherStd(None, 3), r"FisherStd\(fisher\) must be a mapping.*estimate"),
    "FisherStd(num_data)": (lambda: estimated(num_data=LOADER), r"num_data\) must be.*len\(loader.dataset\)"),
    "FisherStd(model)": (
        lambda: bnnify.FisherStd.estimate("model", [], num_data=1, likelihood="logits"),
        "must be a torch.nn.Module",
    ),
    "export": (lambda: bnnify.export({}, "x.pt2", ONE), r"export\(bnn\) must be a torch.nn.Module, not a dict"),
    "export(path)": (lambda: bnnify.export(converted(), None, ONE), r"export\(path\) must be a path, not None"),
    "quantize": (lambda: bnnify.quantize({}, LOADER), r"quantize\(bnn\) must be a torch.nn.Module, not a dict"),
    "save": (
        lambda: bnnify.save(nn.Linear(4, 3), "x.pt"),
        "save takes a converted model, not a Linear.*bnnify.convert",
    ),
    "save(path)": (lambda: bnnify.save(converted(), None), r"save\(path\) must be a path, not None"),
    "load(path)": (lambda: bnnify.load(None), r"load\(path\) must be a path, not None"),
    "load(model)": (lambda: bnnify.load("x.pt", "resnet18"), r"load\(model\) must be a torch.nn.Module"),
    "load_weights": (lambda: bnnify.load_weights(None, {}), r"load_weights\(model\) must be a torch.nn.Module"),
    "convert_checkpoint(path)": (lambda: bnnify.convert_checkpoint(None), r"convert_checkpoint\(path\) must be a path"),
    "make_model": (
        lambda: bnnify.convert_checkpoint("x.pt", nn.Linear(4, 3)),
        "make_model must be a function that returns the model, not a Linear. Pass lambda: model",
    ),
    "make_model()": (
        lambda: bnnify.convert_checkpoint("x.pt", lambda: 3),
        "What make_model returns must be a torch.nn.Module, not 3",
    ),
    "from_adam(model)": (lambda: from_adam("model"), "must be a torch.nn.Module"),
    "from_adam(batch_size)": (lambda: from_adam(batch_size=LOADER), r"batch_size\) must be a number"),
}


@pytest.mark.parametrize("call", CALLS)
def test_an_argument_of_a_wrong_type_is_refused_by_name(call):
    function, match = CALLS[call]
    with pytest.raises(TypeError, match=match):
        function()


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda: estimated(chunk_size=0), "chunk_size"),
        (lambda: estimated(chunk_size="4"), "chunk_size"),
        (lambda: estimated(chunk_size=1.5), "chunk_size"),
        (lambda: tuned(seed=2**70), r"tune_std\(seed\) must be an integer from 0"),
        (lambda: estimated(num_data=True), "num_data"),
        (lambda: bnnify.prune(converted(), "0.5"), "fraction.* must lie between 0 and 1, not '0.5'"),
        (lambda: bnnify.prune(nn.Linear(4, 3), 0.5), "Linear has no Bayesian parameters: bnnify.convert"),
        (lambda: bnnify.convert(nn.Linear(4, 3), exclude=5), "Unknown exclude 5: give a glob"),
        (lambda: bnnify.convert(nn.Linear(4, 3), select=[1]), r"Unknown select \[1\]: give a glob"),
        (lambda: bnnify.convert(nn.Linear(4, 3), prior={1: None}), r"Unknown prior \(1,\): give a glob"),
        (lambda: bnnify.convert(nn.Linear(4, 3), estimator=["local"]), r"Unknown estimator \['local'\]"),
        (lambda: bnnify.register_layer(nn.Identity, None), "list of names of parameters, not None"),
        (lambda: bnnify.register_layer(nn.Identity, nn.Identity()), "list of names of parameters"),
    ],
)
def test_an_argument_that_a_conversion_cannot_use_is_refused_by_name(function, match):
    with pytest.raises((bnnify.ArgumentError, bnnify.ConversionError), match=match):
        function()


@pytest.mark.parametrize(
    "call",
    [
        lambda num_samples: converted().predict(torch.zeros(2, 4), num_samples),
        lambda num_samples: converted().sample(torch.zeros(2, 4), num_samples=num_samples),
        lambda num_samples: bnnify.freeze(converted(), num_samples),
        lambda num_samples: tuned(num_samples=num_samples),
    ],
    ids=["predict", "sample", "freeze", "tune_std"],
)
def test_a_number_of_samples_is_a_positive_integer(call):
    for num_samples in (0, -3, 2.0, "8", None, True, LOADER, torch.tensor(3)):
        with pytest.raises(ValueError, match="num_samples must be a positive integer"):
            call(num_samples)


def test_numbers_of_other_libraries_are_numbers():
    numpy = pytest.importorskip("numpy")
    assert converted().predict(torch.zeros(2, 4), numpy.int64(3)).num_samples == 3
    for num_data in numpy.int64(10), numpy.float32(10), torch.tensor(10):
        assert bnnify.elbo(ONE, ONE, num_data).item() == pytest.approx(1.1)
    assert bnnify.elbo(ONE, ONE, 10, beta=torch.tensor(0.5)).item() == pytest.approx(1.05)


def test_the_threshold_of_avuc_is_not_taken_from_logits():
    with pytest.raises(ValueError, match="probabilities that sum to one"):
        bnnify.uncertainty_threshold(torch.tensor([[2.0, -1.0], [0.5, 3.0]]), torch.tensor([0, 0]))


def test_the_elbo_still_compiles_as_one_graph_when_beta_changes():
    compiled = torch.compile(bnnify.elbo, fullgraph=True, backend="eager")
    for beta in 0.25, 0.5, 1.0:
        assert compiled(ONE, 2 * ONE, 10, beta).item() == pytest.approx(1 + beta / 5)
    with pytest.raises(ValueError, match="beta"):
        bnnify.elbo(ONE, ONE, 10, math.nan)
