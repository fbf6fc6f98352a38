"""One graph of frozen networks: the outputs that they have, and what stands and runs in it once."""

import copy

import pytest
import torch
from torch import nn

import bnnify
from tests import zoo

K = 3


def frozen(model, **options):
    torch.manual_seed(1)
    return bnnify.freeze(bnnify.convert(model.eval(), **options), K)


def calls(graph, operator):
    return sum(node.target is operator for node in graph.module.graph.nodes)


@pytest.mark.parametrize(
    "name", ["residual_block", "lstm", "attention", "tied_language_model", "used_twice", "dict", "unrolled", "encoder"]
)
@torch.no_grad()
def test_its_outputs_are_those_of_the_networks(name):
    model, inputs = zoo.build(name)
    ensemble = frozen(model)
    found, expected = ensemble.as_graph(inputs)(*inputs), ensemble(*inputs)
    for one, other in zip(zoo.tensors(found), zoo.tensors(expected), strict=True):
        torch.testing.assert_close(one, other)
    assert type(found) is type(expected)
    assert not zoo.equal(*zoo.tensors(found)[0][:2])


class InPlace(nn.Module):
    """Writes to what was read before, and adds what depends on the sample to what does not."""

    def __init__(self):
        super().__init__()
        self.trunk, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        hidden = self.trunk(x)
        out = self.head(hidden)
        hidden.relu_()
        before = hidden.clone()
        hidden += self.head(hidden)
        return out, before, hidden


@torch.no_grad()
def test_what_one_network_writes_in_place_reaches_no_other():
    ensemble, x = frozen(InPlace(), select="head.*"), torch.randn(2, 4)
    for found, expected in zip(ensemble.as_graph(x)(x), ensemble(x), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("select", "convolutions"), [("fc.*", 2), ("*", 2 * K)])
@torch.no_grad()
def test_what_does_not_depend_on_the_sample_runs_once_and_stands_once(select, convolutions):
    layers = {"one": nn.Conv2d(3, 4, 3), "two": nn.Conv2d(4, 4, 3), "pool": nn.AdaptiveAvgPool2d(1)}
    model = nn.Sequential()
    for name, layer in {**layers, "flat": nn.Flatten(), "fc": nn.Linear(4, 2)}.items():
        model.add_module(name, layer)
    x = torch.randn(2, 3, 8, 8)
    ensemble = frozen(model, select=select)
    graph = ensemble.as_graph(x)
    assert torch.equal(graph(x), ensemble(x))
    assert calls(graph, torch.ops.aten.conv2d.default) == convolutions
    assert calls(graph, torch.ops.aten.linear.default) == K
    assert sum(p.numel() for p in graph.parameters()) == sum(p.numel() for p in ensemble.parameters())
    assert {id(p) for p in graph.parameters()} == {id(p) for p in ensemble.parameters()}


@pytest.mark.parametrize(
    "compute", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm, nn.utils.weight_norm]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@torch.no_grad()
def test_weights_that_are_computed_are_computed_from_what_was_drawn(compute):
    ensemble, x = frozen(nn.Sequential(compute(nn.Linear(4, 6)), nn.ReLU())), torch.randn(5, 4)
    torch.testing.assert_close(ensemble.as_graph(x)(x), ensemble(x))


@torch.no_grad()
def test_it_is_in_eval_mode_and_leaves_the_flags_of_the_networks():
    x = torch.randn(4, 4)
    ensemble = bnnify.freeze(bnnify.convert(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()).train()), K)
    graph = ensemble.as_graph(x)
    assert all(module.training for module in ensemble.modules() if module is not ensemble.networks)
    assert torch.equal(graph(x), graph(x))
    assert torch.equal(graph(x), ensemble.eval()(x))


@torch.no_grad()
def test_the_batch_may_have_any_size_and_all_else_the_size_of_the_example():
    graph = frozen(nn.Linear(4, 3)).as_graph(torch.randn(2, 4))
    assert graph(torch.randn(7, 4)).shape == (K, 7, 3)
    with pytest.raises(bnnify.ArgumentError, match=r"input.size\(\)\[1\] == 4"):
        graph(torch.randn(2, 5))
    with pytest.raises(bnnify.ArgumentError, match="as they were given in the example"):
        graph(input=torch.randn(2, 4))
    fixed = frozen(nn.Linear(4, 3)).as_graph(torch.randn(2, 4), dynamic_shapes=None)
    with pytest.raises(bnnify.ArgumentError, match=r"dynamic_shapes="):
        fixed(torch.randn(7, 4))


class DependsOnSize(nn.Linear):
    def forward(self, x):
        return super().forward(x if x.shape[0] % 2 else -x)


def test_where_the_code_depends_on_the_size_of_the_batch_the_graph_refuses_what_it_is_not_for():
    graph = frozen(DependsOnSize(4, 3)).as_graph(torch.randn(2, 4))
    with pytest.raises(bnnify.ArgumentError, match="size"):
        graph(torch.randn(3, 4))


@torch.no_grad()
def test_it_can_be_copied_loaded_compiled_and_exported():
    x = torch.randn(2, 4)
    one, other = (bnnify.freeze(bnnify.convert(nn.Linear(4, 3)), K).as_graph(x) for _ in range(2))
    assert not torch.equal(one(x), other(x))
    other.load_state_dict(one.state_dict())
    exported = torch.export.export(other, (x,)).module()
    for each in (copy.deepcopy(one), other, exported, torch.compile(one, backend="eager", fullgraph=True)):
        assert torch.equal(each(x), one(x))


def test_a_part_of_the_output_can_be_chosen():
    model, inputs = zoo.build("object")
    assert frozen(model).as_graph(inputs, output="logits")(*inputs).shape[0] == K


def test_networks_of_which_one_was_changed_are_no_graph():
    ensemble = frozen(nn.Sequential(nn.Linear(4, 4), nn.LeakyReLU(0.1)))
    ensemble.networks[1][1].negative_slope = 0.5
    with pytest.raises(bnnify.ExportError, match="does not compute what all of the networks do"):
        ensemble.as_graph(torch.randn(2, 4))


@torch.no_grad()
def test_an_example_that_is_a_part_of_a_larger_batch_does_not_fix_the_size():
    x = torch.randn(8, 3).repeat(1, 2)
    ensemble = frozen(nn.Sequential(nn.Linear(3, 2)))
    assert torch.equal(ensemble.as_graph(x[::2, :3])(x[:5, :3]), ensemble(x[:5, :3]))
