"""Layers whose weight is computed from other parameters: the posterior lies on what is learned."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import bnnify
from bnnify import ConversionError, DrawError
from bnnify.modules.parameters import bayesian_parameters
from tests.contract import Case, broken, drawn_network

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).mT

    def right_inverse(self, x):
        return x.triu()


class LowRank(nn.Module):
    """Has two originals, and a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, left, right):
        return self.scale * left @ right

    def right_inverse(self, weight):
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        return left[:, :2] * values[:2], right[:2]


class Attention(nn.Module):
    """Never calls the projection that is parametrized, and reads it through a function."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


def registered(layer, *maps, name="weight"):
    for one in maps:
        parametrize.register_parametrization(layer, name, one)
    return layer


def attention(wrap, of=None):
    model = Attention()
    wrap(model.attention if of else model.attention.out_proj, of or "weight")
    return model


def pruned(layer, amount=0.5):
    return prune.l1_unstructured(layer, "weight", amount)


def pruned_twice():
    layer = prune.random_unstructured(nn.Linear(4, 3), "weight", 0.3)
    prune.random_unstructured(layer, "bias", 1)
    return pruned(layer)


def after_a_forward(model):
    """As a hook leaves it: with a weight that has a graph, which torch does not deep-copy."""
    model(torch.ones(1, 4)).sum().backward()
    model.zero_grad()
    return model


ROWS = (5, 4)
# What makes the model, the shape of its input, and where the posterior lies.
MODELS = {
    "weight_norm": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)), nn.Tanh(), nn.Linear(3, 2)),
        ROWS,
        {"0.parametrizations.weight.original0", "0.parametrizations.weight.original1", "0.bias", "2.weight", "2.bias"},
    ),
    "weight_norm of a root": (
        lambda: parametrizations.weight_norm(nn.ConvTranspose1d(4, 3, 3), dim=1),
        (2, 4, 6),
        {"parametrizations.weight.original0", "parametrizations.weight.original1", "bias"},
    ),
    "weight_norm of attention's projection": (
        lambda: attention(parametrizations.weight_norm),
        (2, 3, 4),
        {f"attention.out_proj.parametrizations.weight.original{i}" for i in (0, 1)}
        | {"attention.in_proj_weight", "attention.in_proj_bias", "attention.out_proj.bias"},
    ),
    "weight_norm of attention": (
        lambda: attention(parametrizations.weight_norm, "in_proj_weight"),
        (2, 3, 4),
        {f"attention.parametrizations.in_proj_weight.original{i}" for i in (0, 1)}
        | {"attention.in_proj_bias", "attention.out_proj.weight", "attention.out_proj.bias"},
    ),
    "weight_norm of a recurrent layer": (
        lambda: parametrizations.weight_norm(nn.LSTM(4, 3), "weight_hh_l0"),
        (2, 3, 4),
        {"weight_ih_l0", "bias_ih_l0", "bias_hh_l0"} | {f"parametrizations.weight_hh_l0.original{i}" for i in (0, 1)},
    ),
    "spectral_norm": (
        lambda: parametrizations.spectral_norm(nn.Conv2d(2, 3, 2)),
        (2, 2, 4, 4),
        {"parametrizations.weight.original", "bias"},
    ),
    "orthogonal": (
        lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
        ROWS,
        {"parametrizations.weight.original", "bias"},
    ),
    "orthogonal by cayley": (
        lambda: parametrizations.orthogonal(nn.Linear(4, 3), orthogonal_map="cayley", use_trivialization=False),
        ROWS,
        {"parametrizations.weight.original", "bias"},
    ),
    "a user's": (
        lambda: registered(nn.Linear(4, 4), Symmetric(), parametrizations._SpectralNorm(torch.eye(4))),
        ROWS,
        {"parametrizations.weight.original", "bias"},
    ),
    "a user's, of several": (
        lambda: registered(nn.Linear(4, 4, bias=False), LowRank()),
        ROWS,
        {"parametrizations.weight.original0", "parametrizations.weight.original1"},
    ),
    "a bias": (
        lambda: registered(registered(nn.Linear(4, 4), Symmetric()), nn.Softplus(), name="bias"),
        ROWS,
        {"parametrizations.weight.original", "parametrizations.bias.original"},
    ),
    "old weight_norm": (
        lambda: after_a_forward(nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 3)), nn.Linear(3, 2))),
        ROWS,
        {"0.weight_g", "0.weight_v", "0.bias", "1.weight", "1.bias"},
    ),
    "old weight_norm of a recurrent layer": (
        lambda: nn.utils.weight_norm(nn.LSTM(4, 3), "weight_hh_l0"),
        (2, 3, 4),
        {"weight_ih_l0", "weight_hh_l0_g", "weight_hh_l0_v", "bias_ih_l0", "bias_hh_l0"},
    ),
    "old spectral_norm": (lambda: nn.utils.spectral_norm(nn.Linear(4, 3)), ROWS, {"weight_orig", "bias"}),
    "pruned": (lambda: after_a_forward(nn.Sequential(pruned(nn.Linear(4, 4)))), ROWS, {"0.weight_orig", "0.bias"}),
    "pruned twice": (pruned_twice, ROWS, {"weight_orig", "bias_orig"}),
}
every_model = pytest.mark.parametrize("name", MODELS)


def build(name):
    torch.manual_seed(0)
    make, shape, expected = MODELS[name]
    return make(), (torch.randn(shape),), expected


@every_model
def test_every_promise_is_kept_and_the_posterior_lies_on_what_is_learned(name):
    model, inputs, expected = build(name)
    assert not broken(Case(name, lambda: build(name)[0], lambda model: (inputs, {})))
    report = bnnify.convert(model, strict=True).report
    assert {entry.name for entry in report.bayesian} == expected
    assert not [entry for entry in report.left_alone if not entry.name.endswith("scale")]


@every_model
def test_reading_a_weight_gives_it_computed_from_the_draw(name):
    model, inputs, _ = build(name)
    bnn = bnnify.convert(model.eval())

    def weights(module):
        return [
            getattr(child, name)
            for child in module.modules()
            for name in ("weight", "bias", "in_proj_weight", "weight_hh_l0")
            if isinstance(getattr(child, name, None), torch.Tensor)
        ]

    before = weights(bnn.module)
    with bnn.draw():
        inside = weights(bnn.module)
        plain = drawn_network(bnn)
    plain(*inputs)  # lets hooks compute
    assert before
    for found, wanted, mean in zip(inside, weights(plain), before, strict=True):
        assert torch.equal(found, wanted)
        assert not torch.equal(found, mean) or not mean.any()
    assert all(map(torch.equal, before, weights(bnn.module)))


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "old weight_norm", "pruned"])
def test_a_conversion_again_adds_to_the_first(name):
    model, inputs, expected = build(name)
    last = sorted(expected)[-1]
    once = bnnify.convert(model, select=last)
    twice = bnnify.convert(once)
    assert {parameter.name for parameter in bayesian_parameters(twice.module)} == expected
    assert torch.equal(bnnify.collapse(twice)(*inputs), model(*inputs))


@pytest.mark.parametrize("name", ["weight_norm", "a user's", "old weight_norm", "pruned"])
def test_globs_and_functions_select_the_layer(name):
    model, _, expected = build(name)
    layer = "0" if "0.bias" in expected else ""
    wanted = {entry for entry in expected if entry.startswith(layer)} - {"2.weight", "2.bias", "1.weight", "1.bias"}
    chosen = bnnify.convert(model, select=lambda name, module: name == layer and isinstance(module, nn.Linear))
    assert {entry.name for entry in chosen.report.bayesian} == wanted


def test_samples_of_an_orthogonal_weight_are_orthogonal():
    bnn = bnnify.convert(parametrizations.orthogonal(nn.Linear(6, 6).double()), posterior_std=bnnify.Relative(0.2))
    mean = bnn.module.weight
    with bnn.draw():
        sample = bnn.module.weight
    torch.testing.assert_close(sample @ sample.T, torch.eye(6, dtype=torch.float64))
    assert 0.05 < (sample - mean).square().mean().sqrt() / mean.square().mean().sqrt() < 0.5


def test_householder_reflections_are_left_alone_with_the_reason():
    layer = parametrizations.orthogonal(nn.Linear(4, 3), orthogonal_map="householder")
    bnn = bnnify.convert(layer)
    assert [entry.name for entry in bnn.report.bayesian] == ["bias"]
    (entry,) = bnn.report.left_alone
    assert entry.name == "parametrizations.weight.original"
    assert entry.reason.startswith("unsupported: the Householder map reads the signs on its diagonal")
    with pytest.raises(ConversionError, match=r"`parametrizations.weight.original`.*Householder.*'matrix_exp'"):
        bnnify.convert(layer, strict=True)
    with bnn.draw():
        torch.testing.assert_close(layer.weight @ layer.weight.T, torch.eye(3))


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, nn.utils.weight_norm])
def test_the_noise_of_a_weight_normalised_layer_is_of_the_size_asked_for(wrap):
    plain = nn.Linear(200, 40)
    bnn = bnnify.convert(wrap(copy.deepcopy(plain)), posterior_std=bnnify.Relative(0.1))
    with bnn.draw():
        deviation = (bnn.module.weight - plain.weight).detach()
    # The direction and the length of each row have a tenth each.
    assert deviation.square().mean().sqrt() / plain.weight.detach().square().mean().sqrt() == pytest.approx(
        0.14, abs=0.02
    )


def test_what_is_pruned_stays_exactly_zero_and_costs_no_kl():
    bnn = bnnify.convert(pruned(nn.Linear(6, 5), 0.7), posterior_std=bnnify.Relative(0.2))
    mask = bnn.module.weight_mask.bool()
    for _ in range(3):
        with bnn.draw():
            assert (bnn.module.weight[~mask] == 0).all()
            assert (bnn.module.weight[mask] != 0).all()
    output, kl = bnn(torch.randn(4, 6))
    (output.square().sum() + kl).backward()
    assert abs(kl.item()) < 1e-4
    for gradient in (bnn.module.weight_orig.grad, bnn.module.weight_orig_rho.grad):
        assert (gradient[mask] != 0).all()
        assert gradient[~mask].abs().max() < 1e-5  # the prior alone holds them, where they are


def test_a_pruned_direction_of_a_weight_normalised_layer_is_computed_through_both_hooks():
    model = prune.l1_unstructured(nn.utils.weight_norm(nn.Linear(4, 3)), "weight_v", 0.5)
    x, mask = torch.randn(5, 4), model.weight_v_mask.bool()
    model(x)  # torch's weight is behind by one forward
    bnn = bnnify.convert(model, strict=True)
    assert {entry.name for entry in bnn.report.bayesian} == {"weight_g", "weight_v_orig", "bias"}
    with bnn.draw():
        weight, (output, _) = bnn.module.weight, bnn(x)
        assert torch.equal(output, nn.functional.linear(x, weight, bnn.module.bias))
    assert (weight[~mask] == 0).all()
    assert (weight[mask] != model.weight[mask]).all()
    assert torch.equal(bnn.module(x), model(x))
    assert torch.equal(bnnify.collapse(bnn)(x), model(x))


def test_a_parameter_of_the_parametrization_itself_is_converted_when_named():
    model = registered(nn.Linear(4, 4, bias=False), LowRank())
    bnn = bnnify.convert(model, select="parametrizations.weight.0.scale", posterior_std=0.5)
    assert [parameter.name for parameter in bayesian_parameters(bnn.module)] == ["parametrizations.weight.0.scale"]
    with bnn.draw(), parametrize.cached():
        assert torch.allclose(bnn.module.weight, model.weight * getattr(bnn.module.parametrizations.weight, "0").scale)
        assert not torch.equal(bnn.module.weight, model.weight)


@pytest.mark.parametrize("name", ["weight_norm", "a user's"])
def test_the_cache_of_parametrizations_carries_nothing_into_a_draw_or_out_of_it(name):
    model, inputs, _ = build(name)
    expected = model.eval()(*inputs)
    bnn = bnnify.convert(model)
    with parametrize.cached():
        model(*inputs)  # torch's key is the layer that was parametrized, also for copies of it
        assert torch.equal(bnn.module(*inputs), expected)
        first, second = bnn(*inputs)[0], bnn(*inputs)[0]
        assert not torch.equal(first, second)
        with bnn.draw():
            expected_drawn = drawn_network(bnn)
            drawn = bnn(*inputs)[0]
            assert torch.equal(drawn, bnn.module(*inputs))
        assert torch.equal(bnn.module(*inputs), expected)
    torch.testing.assert_close(drawn, expected_drawn(*inputs))


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "a user's"])
def test_torch_does_not_pickle_parametrized_modules_and_the_state_dict_is_the_way(name, tmp_path):
    model, inputs, _ = build(name)
    bnn = bnnify.convert(model)
    for one in (model, bnn):
        with pytest.raises(RuntimeError, match=r"only supported through state_dict\(\)"):
            pickle.dumps(one)
    bnnify.save(bnn, tmp_path / "model.bnn.pt")
    restored = bnnify.load(tmp_path / "model.bnn.pt", build(name)[0])
    assert torch.equal(restored.eval().module(*inputs), model.eval()(*inputs))


@pytest.mark.parametrize("name", ["old weight_norm", "old spectral_norm", "pruned", "pruned twice"])
def test_modules_with_hooks_pickle_and_carry_no_draw(name):
    model, inputs, _ = build(name)
    bnn = bnnify.convert(model)
    bnn.eval()(*inputs)
    with bnn.draw():
        other = pickle.loads(pickle.dumps(bnn))
    assert torch.equal(other.module(*inputs), model.eval()(*inputs))
    assert not torch.equal(other(*inputs)[0], other(*inputs)[0])
    assert not any("weight" in vars(module) for module in other.module.modules())


@pytest.mark.parametrize("name", ["old weight_norm", "pruned"])
def test_a_model_that_torch_does_not_copy_after_a_forward_is_converted_all_the_same(name):
    model, inputs, _ = build(name)
    with pytest.raises(RuntimeError, match="deepcopy protocol"):
        copy.deepcopy(model)
    left = model[0].weight
    assert torch.equal(bnnify.convert(model).module(*inputs), model(*inputs))
    assert left.grad_fn is not None


def test_a_draw_in_training_mode_moves_the_vectors_of_spectral_norm_as_the_drawn_network_does():
    model, inputs, _ = build("spectral_norm")
    bnn = bnnify.convert(model)
    with bnn.draw():
        plain = drawn_network(bnn)
        bnn(*inputs)
    plain(*inputs)
    for key, before in model.named_buffers():
        assert torch.equal(bnn.module.get_buffer(key), plain.get_buffer(key))
        assert not torch.equal(bnn.module.get_buffer(key), before)
    state = copy.deepcopy(bnn.eval().state_dict())
    bnn.predict(*inputs, num_samples=2)
    assert all(torch.equal(state[key], value) for key, value in bnn.state_dict().items())


def test_they_compile_into_one_graph():
    layers = (
        parametrizations.weight_norm(nn.Linear(4, 4)),
        nn.utils.weight_norm(nn.Linear(4, 4)),
        pruned(nn.Linear(4, 4)),
    )
    x, bnn = torch.randn(5, 4), bnnify.convert(nn.Sequential(*layers))
    compiled = torch.compile(bnn, backend="eager", fullgraph=True)
    assert not torch.equal(compiled(x)[0], compiled(x)[0])
    with bnn.draw():
        torch.testing.assert_close(compiled(x)[0], bnn(x)[0])


REMOVALS = {
    "weight_norm": (lambda layer: parametrize.remove_parametrizations(layer, "weight"), "0"),
    "weight_norm of a root": (lambda layer: parametrize.remove_parametrizations(layer, "weight"), ""),
    "old weight_norm": (nn.utils.remove_weight_norm, "0"),
    "old spectral_norm": (nn.utils.remove_spectral_norm, ""),
    "pruned": (lambda layer: prune.remove(layer, "weight"), "0"),
}


@pytest.mark.parametrize("name", REMOVALS)
def test_what_computes_the_weight_is_removed_after_collapsing_and_not_before(name):
    model, inputs, _ = build(name)
    remove, layer = REMOVALS[name]
    bnn = bnnify.convert(model.eval())
    with pytest.raises(DrawError, match=r"Cannot remove what computes `weight` of Bayesian.*bnnify.collapse first"):
        remove(bnn.module.get_submodule(layer))
    assert torch.equal(bnn.module(*inputs), model(*inputs))
    assert not torch.equal(bnn(*inputs)[0], bnn(*inputs)[0])
    plain = bnnify.collapse(bnn, inplace=True)
    expected = plain(*inputs)
    remove(plain.get_submodule(layer))
    assert isinstance(plain.get_submodule(layer).weight, nn.Parameter)
    torch.testing.assert_close(plain(*inputs), expected)
    assert len(bnnify.convert(plain).report.left_alone) == 0


def test_removing_a_parametrization_of_one_tensor_says_that_torch_has_overwritten_it():
    model, inputs, _ = build("orthogonal")
    bnn = bnnify.convert(model)
    with pytest.raises(DrawError, match="overwritten the parameter if it was a single one: load the weights again"):
        parametrize.remove_parametrizations(bnn.module, "weight")
    bnnify.load_weights(bnn, model.state_dict())
    assert torch.equal(bnn.module(*inputs), model(*inputs))
