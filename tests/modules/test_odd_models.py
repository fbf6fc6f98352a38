"""Models that are not a tree of layers calling layers, and layers that are converted only when selected."""

import functools
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnnify
from bnnify.modules.parameters import bayesian_parameters
from tests import zoo
from tests.contract import Case, broken, drawn_network


class FunctionalCall(nn.Module):
    """Calls a part of itself with other values in the place of its parameters, here scaled ones."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4))

    def forward(self, x):
        scaled = {name: 0.5 * getattr(self.body[int(name[0])], name[2:]) for name, _ in self.body.named_parameters()}
        return x + torch.func.functional_call(self.body, scaled, (x,)) + self.body(x)


class CallsWithNamedParameters(nn.Module):
    """Fetches the parameters of a part by name, and calls it with a function of them."""

    def __init__(self, change):
        super().__init__()
        self.change = change
        self.body = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4))

    def forward(self, x):
        values = {name: self.change(value) for name, value in self.body.named_parameters()}
        return torch.func.functional_call(self.body, values, (x,))


class OneStepLearner(nn.Module):
    """Takes a gradient step on its own parameters, and calls itself with the result."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        weight = self.fc.weight
        step = torch.func.grad(lambda w: F.linear(x, w, self.fc.bias).square().mean())(weight)
        return torch.func.functional_call(self.fc, {"weight": weight - 0.1 * step}, (x,))


class Hypernetwork(nn.Module):
    """One layer makes the weight of another one, which has only a bias of its own."""

    def __init__(self):
        super().__init__()
        self.make = nn.Linear(4, 12)
        self.main = nn.Linear(4, 3)
        del self.main.weight

    def forward(self, x):
        self.main.weight = self.make(x.mean(0)).view(3, 4)
        try:
            return self.main(x)
        finally:
            del self.main.weight


class Threaded(nn.Module):
    """The parent puts an argument into a child's hooks, and takes its hidden output from there."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x, scale):
        hidden = []
        before = self.second.register_forward_pre_hook(lambda module, args: (scale * args[0],))
        after = self.first.register_forward_hook(lambda module, args, output: hidden.append(output))
        try:
            return self.second(torch.tanh(self.first(x))) + hidden[0]
        finally:
            before.remove()
            after.remove()


class KeepsFunctions(nn.Module):
    """Stores bound methods of its layers, as an attribute and in a list, and a partial of one."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.out = nn.Linear(4, 2)
        self.apply_fc = self.fc.forward
        self.steps = [self.fc.__call__, functools.partial(torch.mul, 2.0), self.out.forward]

    def forward(self, x):
        x = self.apply_fc(x)
        for step in self.steps:
            x = step(x)
        return x


def with_its_own_forward():
    def forward(self, x):
        return F.linear(x, self.weight * 2, self.bias)

    layer = nn.Linear(4, 3)
    layer.forward = types.MethodType(forward, layer)
    return nn.Sequential(layer, nn.Linear(3, 2))


class Parameters(nn.Module):
    """Bare parameters, alone, in a list and in a dictionary, beside a layer."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 4))
        self.many = nn.ParameterList([nn.Parameter(torch.randn(4)) for _ in range(2)])
        self.named = nn.ParameterDict({"gain": nn.Parameter(torch.ones(4)), "shift": nn.Parameter(torch.zeros(4))})
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        x = x @ self.table
        for vector in self.many:
            x = torch.tanh(x + vector)
        return self.fc(x * self.named["gain"] + self.named["shift"])


class Bags(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.bag = nn.EmbeddingBag(7, 4, mode="sum", **options)

    def forward(self, ids, weights):
        return self.bag(ids, per_sample_weights=weights)


def ids(*shape):
    return lambda: (torch.randint(1, 7, shape),)


ATTENTION = {"attention.in_proj_bias", "attention.out_proj.weight", "attention.out_proj.bias"}
EXTRA = {"attention.bias_k", "attention.bias_v"}
# What makes the model and its inputs, what is selected, and what is Bayesian then (everything, where it says None).
MODELS = {
    "functional_call": (FunctionalCall, zoo.rows(5, 4), None, None),
    "a step of gradient descent": (OneStepLearner, zoo.rows(5, 4), None, None),
    "hypernetwork": (Hypernetwork, zoo.rows(5, 4), None, None),
    "threaded through hooks": (Threaded, lambda: (torch.randn(5, 4), torch.tensor(3.0)), None, None),
    "functions kept": (KeepsFunctions, zoo.rows(5, 4), None, None),
    "a forward of its own": (with_its_own_forward, zoo.rows(5, 4), None, None),
    "embedding": (lambda: nn.Embedding(7, 4, padding_idx=2), ids(2, 5), "", None),
    "embedding scaled by frequency": (lambda: nn.Embedding(7, 4, scale_grad_by_freq=True), ids(2, 5), "", None),
    "bag": (lambda: nn.EmbeddingBag(7, 4, padding_idx=2), ids(2, 5), "", None),
    "bag with weights": (Bags, lambda: (*ids(2, 5)(), torch.rand(2, 5)), "bag", None),
    "attention with biases to key and value": (
        lambda: zoo.Attention(add_bias_kv=True, add_zero_attn=True),
        lambda: tuple(torch.randn(2, 3, 8) for _ in range(3)),
        None,
        ATTENTION | {"attention.in_proj_weight"},
    ),
    "attention with biases, selected": (
        lambda: zoo.Attention(add_bias_kv=True),
        lambda: tuple(torch.randn(2, 3, 8) for _ in range(3)),
        ["attention", "attention.bias_?"],
        ATTENTION | EXTRA | {"attention.in_proj_weight"},
    ),
    "bare parameters": (Parameters, zoo.rows(5, 4), ["table", "many.*", "named.gain", "named.shift", "fc"], None),
}


def build(name):
    torch.manual_seed(0)
    make, inputs, select, expected = MODELS[name]
    return make(), inputs(), {"select": "weight" if select == "" else select}, expected


@pytest.mark.parametrize("name", MODELS)
def test_every_promise_is_kept_and_the_weights_are_bayesian(name):
    model, inputs, options, expected = build(name)
    assert not broken(Case(name, lambda: build(name)[0], lambda model: (inputs, {}), settings=options))
    bnn = bnnify.convert(model, **options)
    assert {entry.name for entry in bnn.report.bayesian} == (expected or {name for name, _ in model.named_parameters()})


@pytest.mark.parametrize("training", [True, False])
def test_a_whole_transformer(training):
    model = nn.Transformer(8, 2, 1, 2, 16, dropout=0.0, batch_first=True).train(training)
    bnn = bnnify.convert(model)
    source, target = torch.randn(2, 5, 8), torch.randn(2, 4, 8)
    left = {entry.name for entry in bnn.report.left_alone}
    assert left
    assert all("norm" in name for name in left)
    with bnn.draw(), torch.set_grad_enabled(training):
        mask = nn.Transformer.generate_square_subsequent_mask(4)
        plain, output = drawn_network(bnn), bnn(source, target, tgt_mask=mask)[0]
        torch.testing.assert_close(output, plain(source, target, tgt_mask=mask))
        assert not torch.allclose(output, model(source, target, tgt_mask=mask), atol=1e-3)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
def test_a_sparse_embedding_trains_with_dense_gradients(layer, training):
    # The sample is a function of the whole mean and the whole rho, each element of which moves it.
    bnn = bnnify.convert(layer(7, 4, sparse=True).train(training), select="weight")
    x = torch.tensor([[1, 2], [2, 5]])
    bnn(x)[0].square().sum().backward()
    for parameter in bayesian_parameters(bnn.module):
        for gradient in (parameter.mean.grad, parameter.rho.grad):
            assert gradient is not None
            assert (gradient.to_dense()[[1, 2, 5]] != 0).all()
            assert (gradient.to_dense()[[0, 3, 4, 6]] == 0).all()


def test_the_padding_of_an_embedding_is_drawn_like_the_rest_and_gets_no_gradient():
    bnn = bnnify.convert(nn.Embedding(7, 4, padding_idx=2), select="weight")
    output, _ = bnn(torch.tensor([2, 3]))
    output.square().sum().backward()
    for gradient in (bnn.module.weight.grad, bnn.module.weight_rho.grad):
        assert (gradient[2] == 0).all()
        assert (gradient[3] != 0).all()


def test_parameters_fetched_by_name_are_drawn_and_values_computed_from_them_are_reported_by_audit():
    """A draw replaces the parameter it was made for. Any other value is what somebody wants to be there."""
    x = torch.randn(5, 4)
    bnn = bnnify.convert(CallsWithNamedParameters(lambda value: value))
    with bnn.draw():
        torch.testing.assert_close(bnn(x)[0], drawn_network(bnn)(x))
    assert not bnnify.audit(bnn, x)
    scaled = bnnify.convert(CallsWithNamedParameters(lambda value: 0.5 * value))
    assert torch.equal(scaled(x)[0], scaled.module(x))
    assert set(bnnify.audit(scaled, x).replaced) == {entry.name for entry in scaled.report.bayesian}


# What is stored on a model belongs to its copy after a conversion


def test_stored_methods_and_lists_refer_to_the_converted_copy():
    model, x = KeepsFunctions(), torch.randn(5, 4)
    converted = bnnify.convert(model).module
    assert converted.apply_fc.__self__ is converted.fc
    assert converted.steps[2].__self__ is converted.out
    assert model.apply_fc.__self__ is model.fc
    before = model(x)
    with torch.no_grad():
        converted.fc.weight.zero_()
    assert torch.equal(model(x), before)


def test_a_forward_of_an_instance_is_kept_and_bound_to_the_copy():
    model = with_its_own_forward()
    converted = bnnify.convert(model).module
    assert converted[0].forward.__self__ is converted[0]
    assert model[0].forward.__self__ is model[0]
    collapsed = bnnify.collapse(converted)
    assert collapsed[0].forward.__self__ is collapsed[0]


class PlainList(nn.Module):
    """Layers in a Python list, which torch does not see: no parameters(), no state_dict, no to()."""

    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(4, 4), nn.Linear(4, 4)]
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def test_layers_in_a_plain_list_stay_as_they_are_as_for_torch():
    model, x = PlainList(), torch.randn(5, 4)
    bnn = bnnify.convert(model)
    assert [entry.name for entry in bnn.report.entries] == ["head.weight", "head.bias"]
    assert torch.equal(bnn.module(x), model(x))
    assert [type(layer) for layer in bnn.module.layers] == [nn.Linear, nn.Linear]
    assert bnn.module.layers[0] is not model.layers[0]
    assert not torch.equal(bnn(x)[0], bnn(x)[0])


def test_a_list_of_layers_that_are_also_registered_is_the_same_layers():
    model, x = PlainList(), torch.randn(5, 4)
    model.registered = nn.ModuleList(model.layers)
    bnn = bnnify.convert(model)
    assert bnn.module.layers[0] is bnn.module.registered[0]
    assert len(bnn.report.bayesian) == 6
    with bnn.draw():
        torch.testing.assert_close(bnn(x)[0], drawn_network(bnn)(x))
