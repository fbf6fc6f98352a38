"""The closed form of a Bayesian last layer: the average over many networks, or an error that says why not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnnify
from tests import zoo

LAST = {
    "root_linear": {},
    "mlp": {"select": "2"},
    "partly_frozen": {"select": "2"},
    "swin": {"select": "head"},
    "checkpointed": {"select": "last"},
    "unrolled": {"select": "read"},
    "dict": {"select": "heads.a", "output": "a"},
    "dataclass": {"select": "heads.b", "output": "hidden"},
    "object": {"select": "heads.a", "output": lambda found: found.logits},
}
"""The models of the zoo whose last layer is a linear one, its name, and its output where that is a part."""

K = 3000


def networks_and_closed_form(bnn, x, **options):
    """The prediction from K networks, and the closed form with K samples where it draws any."""
    torch.manual_seed(1)
    bnn.eval()
    return bnn.predict(x, K, **options), bnn.predict(x, K, closed_form=True, **options)


def check_moments(networks, exact):
    error = networks.std / K**0.5
    assert (exact.mean - networks.mean).abs().le(5 * error + 1e-6).all()
    torch.testing.assert_close(exact.std, networks.std, rtol=5 / (2 * K) ** 0.5, atol=1e-6)


@pytest.mark.parametrize("name", LAST)
def test_values_have_the_moments_that_networks_tend_to(name):
    options = dict(LAST[name])
    model, arguments = zoo.build(name)
    bnn = bnnify.convert(model, select=options.pop("select", None), posterior_std=bnnify.Relative(0.3))
    check_moments(*networks_and_closed_form(bnn, arguments, **options))


@pytest.mark.parametrize("name", [name for name in zoo.ZOO if name not in LAST])
def test_every_other_model_of_the_zoo_is_refused(name):
    model, arguments = zoo.build(name)
    with pytest.raises(bnnify.ArgumentError, match="closed_form=True is exact where"):
        bnnify.convert(model).predict(arguments, closed_form=True)


SETTINGS = {
    "bias alone": {"select": "2.bias"},
    "weight alone": {"select": "2.weight"},
    "a local estimator": {"select": "2", "estimator": "local"},
    "point elsewhere": {"posterior": {"0": bnnify.Point(), "*": bnnify.MeanField()}},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_whatever_of_the_layer_is_noisy_counts(settings):
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    bnn = bnnify.convert(model, posterior_std=0.3, **settings)
    check_moments(*networks_and_closed_form(bnn, torch.randn(2, 5, 4, dtype=torch.float64)))  # sequences


def test_pruned_weights_make_no_noise():
    bnn = bnnify.convert(nn.Linear(8, 5), posterior_std=0.3)
    bnnify.prune(bnn, 0.6)
    check_moments(*networks_and_closed_form(bnn, torch.randn(4, 8)))
    bnnify.prune(bnn, 1.0)
    assert not bnn.predict(torch.randn(4, 8), closed_form=True).std.any()


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_widened(autocast):
    bnn = bnnify.convert(nn.Linear(64, 3), posterior_std=0.01)
    x = torch.randn(5, 64).bfloat16().float() * 1e-3  # squares of which bfloat16 would round
    half = bnn if autocast else bnnify.convert(bnnify.collapse(bnn).bfloat16(), posterior_std=0.01)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = half.predict(x if autocast else x.bfloat16(), closed_form=True)
    rho = half.module.weight_rho.float()
    expected = F.linear(x**2, F.softplus(rho) ** 2, F.softplus(half.module.bias_rho.float()) ** 2).sqrt()
    torch.testing.assert_close(found.std, expected, rtol=1e-5, atol=0)
    assert found.mean.dtype == torch.float32


@pytest.mark.parametrize("likelihood", ["logits", "binary_logits"])
def test_entropies_are_those_of_many_networks(likelihood):
    bnn = bnnify.convert(nn.Linear(4, 3), posterior_std=0.7)
    networks, drawn = networks_and_closed_form(bnn, torch.randn(20, 4), likelihood=likelihood)
    assert (drawn.mean - networks.mean).abs().le(5 * (2 / K) ** 0.5 * networks.std).all()
    torch.testing.assert_close(drawn.std, networks.std, rtol=0.1, atol=1e-3)
    torch.testing.assert_close(drawn.predictive_entropy, networks.predictive_entropy, rtol=0.05, atol=0.01)
    torch.testing.assert_close(drawn.mutual_information, networks.mutual_information, rtol=0.1, atol=0.005)


def test_each_batch_of_a_loader_takes_one_forward():
    calls = []
    bnn = bnnify.convert(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), select="1")
    bnn.module[0].register_forward_hook(lambda *_: calls.append(1))
    x, y = torch.randn(7, 4), torch.zeros(7)
    found = bnn.predict(zip(x.split(3), y.split(3), strict=True), closed_form=True)
    assert len(calls) == 3
    torch.testing.assert_close(found.std, bnn.predict(x, closed_form=True).std)


class Head(nn.Module):
    """A last layer with something in its forward that the closed form does not know."""

    def __init__(self, forward):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.does = forward

    def forward(self, x):
        return self.does(self, x)


def written_to(model, x):
    logits = model.head(x)
    logits[:, 0] = -1e4
    return logits


REFUSED = {
    "two Bayesian layers": ("*", lambda m, x: m.head(m.body(x)), r"`head\.weight`.*is not the first Bayesian layer"),
    "a softmax afterwards": ("head", lambda m, x: m.head(x).softmax(-1), "something is computed from what"),
    "two calls": ("head", lambda m, x: m.head(m.head(x)), "is called twice"),
    "a read elsewhere": ("head", lambda m, x: m.head(x @ m.head.weight), r"`head\.weight` \(\w+\).*matmul\(\)"),
    "a read of numbers": ("head", lambda m, x: m.head(x * m.head.weight[0, 0].item()), "__getitem__"),
    "a list of weights": ("head", lambda m, x: m.head(x + torch.stack([m.head.bias])), "stack"),
    "a write afterwards": ("head", written_to, "writes into"),
    "no call": ("head", lambda m, x: m.body(x), "called no linear layer"),
}


@pytest.mark.parametrize(("select", "forward", "message"), REFUSED.values(), ids=REFUSED)
def test_where_it_is_not_exact_it_is_refused(select, forward, message):
    bnn = bnnify.convert(Head(forward), select=select)
    with pytest.raises(bnnify.ArgumentError, match=message):
        bnn.predict(torch.randn(3, 4), closed_form=True)


def test_a_weight_that_is_used_where_torch_does_not_show_it_leaves_no_number():
    @torch.jit.script
    def scaled(x: torch.Tensor, weight: torch.Tensor):
        return x * weight.sum()

    bnn = bnnify.convert(Head(lambda model, x: model.head(scaled(x, model.head.weight))), select="head")
    with pytest.raises(bnnify.ArgumentError, match=r"\(mean\) is NaN"):
        bnn.predict(torch.randn(3, 4), closed_form=True)


def test_nested_tensors_are_refused():
    rows = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=torch.jagged)
    with pytest.raises(bnnify.ArgumentError, match="nested tensor"):
        bnnify.convert(nn.Linear(4, 3)).predict(rows, closed_form=True)


def test_another_likelihood_or_way_to_run_networks_is_refused():
    bnn = bnnify.convert(nn.Linear(4, 3))
    for likelihood in "probabilities", "gaussian", lambda mean: torch.distributions.Normal(mean, 1.0):
        with pytest.raises(bnnify.ArgumentError, match="closed_form=True is for likelihood='values'"):
            bnn.predict(torch.randn(3, 4), closed_form=True, likelihood=likelihood)
    with pytest.raises(bnnify.ArgumentError, match="class_dim=1 puts together"):
        bnn.predict(torch.randn(3, 5, 4), closed_form=True, likelihood="logits", class_dim=1)
    for option in {"antithetic": True}, {"networks_at_once": 2}:
        with pytest.raises(bnnify.ArgumentError, match="draws no networks"):
            bnn.predict(torch.randn(3, 4), closed_form=True, **option)
