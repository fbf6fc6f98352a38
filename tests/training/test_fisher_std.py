"""FisherStd: the information is the analytic one, Adam's state is read right, and a conversion has exactly that σ."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical, Normal
from torch.utils.data import DataLoader, TensorDataset

import bnnify
from bnnify import ArgumentError, ConversionError, FisherStd, Relative
from bnnify.distributions.gaussian import std
from bnnify.modules.parameters import bayesian_parameters, unique_bayesian_parameters
from tests import zoo


def loader(x, batch_size=500):
    return DataLoader(TensorDataset(x, torch.zeros(len(x), dtype=torch.long)), batch_size)


def repeated(x, times):
    return x.repeat(times, *[1] * (x.ndim - 1))


# The information


def test_of_linear_regression_it_is_the_precision_of_the_exact_posterior():
    x, noise, prior_std = torch.randn(20, 3) * torch.tensor([0.3, 1.0, 3.0]), 0.5, 0.7
    model = nn.Linear(3, 1)
    fisher = FisherStd.estimate(
        model, loader(repeated(x, 2000)), num_data=20, prior_std=prior_std, likelihood=lambda mean: Normal(mean, noise)
    )
    design = torch.cat([x, torch.ones(20, 1)], 1)
    precision = (design.T @ design / noise**2 + torch.eye(4) / prior_std**2).diagonal()
    bnn = bnnify.convert(model, posterior_std=fisher)
    found = torch.cat([std(bnn.module.weight_rho)[0], std(bnn.module.bias_rho)])
    torch.testing.assert_close(found, precision.rsqrt(), rtol=0.03, atol=0)


def test_of_softmax_regression_it_is_the_closed_form():
    x, model = torch.randn(10, 2), nn.Linear(2, 3)
    p = model(x).softmax(1)
    expected = (p * (1 - p)).T @ x.square() / 10  # E[(1[y=c] - p_c)²] = p_c (1 - p_c)
    found = FisherStd.estimate(model, loader(repeated(x, 4000)), likelihood="logits").fisher
    torch.testing.assert_close(found["weight"], expected.detach(), rtol=0.05, atol=0)
    torch.testing.assert_close(found["bias"], (p * (1 - p)).mean(0).detach(), rtol=0.05, atol=0)


def test_labels_come_from_the_model_and_not_from_data_that_it_has_fitted():
    # All labels are as expected, and with them the squared gradients would be (1 - p)², fifty times too small.
    x, model = torch.ones(40_000, 1), nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 4.0)
    p = torch.sigmoid(torch.tensor(4.0))
    data = DataLoader(TensorDataset(x, torch.ones(len(x))), 1000)
    found = FisherStd.estimate(model, data, likelihood="binary_logits").fisher["weight"].item()
    assert found == pytest.approx((p * (1 - p)).item(), rel=0.15)


def test_with_a_predicted_variance_both_heads_get_their_information():
    model = nn.ModuleDict({"mean": nn.Linear(1, 1), "log_variance": nn.Linear(1, 1)})
    model.forward = lambda x: (model["mean"](x), model["log_variance"](x).exp())
    nn.init.zeros_(model["log_variance"].weight)
    nn.init.constant_(model["log_variance"].bias, 0.5)
    found = FisherStd.estimate(model, loader(torch.ones(40_000, 1)), likelihood="gaussian").fisher
    assert found["mean.bias"].item() == pytest.approx(torch.tensor(-0.5).exp().item(), rel=0.05)
    assert found["log_variance.bias"].item() == pytest.approx(0.5, rel=0.1)


def test_a_datum_is_an_example_with_all_its_positions():
    x, model = torch.randn(10, 7, 1), nn.Linear(1, 1, bias=False)
    found = FisherStd.estimate(model, loader(repeated(x, 2000)), likelihood=lambda mean: Normal(mean, 2.0)).fisher
    torch.testing.assert_close(found["weight"].squeeze(), x.square().sum((1, 2)).mean() / 4, rtol=0.05, atol=0)


class MostLikely(Categorical):
    """Draws no labels, so that a reference can have the same."""

    def sample(self, sample_shape=()):
        return self.logits.argmax(-1)


def convolutional():
    return nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.ConvTranspose2d(3, 2, 2), nn.Flatten(),
        nn.Dropout(0.5), nn.Linear(2 * 16, 3),
    )  # fmt: skip


MODELS = {
    "convolutional": (convolutional, lambda: torch.randn(9, 1, 4, 4)),
    "attention": (zoo.encoder, lambda: torch.randn(9, 3, 8)),
    "recurrence": (zoo.Unrolled, lambda: torch.randn(9, 2, 3)),
    "tied": (zoo.TiedLanguageModel, lambda: torch.randint(0, 11, (9, 4))),
    "frozen": (zoo.PartlyFrozen, lambda: torch.randn(9, 4)),
}


@pytest.mark.parametrize(("name", "chunk_size"), [*((name, None) for name in MODELS), ("attention", 4), ("tied", 1)])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_it_is_the_mean_square_of_the_gradients_of_single_examples_in_eval_mode(name, chunk_size):
    build, inputs = MODELS[name]
    model, x = build().train(), inputs()
    if name == "convolutional":
        model[1].eval()
    flags = [module.training for module in model.modules()]
    buffers = copy.deepcopy(dict(model.named_buffers()))
    found = FisherStd.estimate(
        model, loader(x, 6), likelihood=lambda logits: MostLikely(logits=logits), chunk_size=chunk_size
    )
    assert found.num_data == 9
    assert [module.training for module in model.modules()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(buffers[key], value) for key, value in model.named_buffers())

    trained = {key: parameter for key, parameter in model.eval().named_parameters() if parameter.requires_grad}
    expected = {key: torch.zeros_like(parameter) for key, parameter in trained.items()}
    for example in x.split(1):
        logits = model(example)
        nll = F.cross_entropy(logits.flatten(0, -2), logits.argmax(-1).flatten(), reduction="sum")
        for key, gradient in zip(trained, torch.autograd.grad(nll, list(trained.values())), strict=True):
            expected[key] += gradient.square() / len(x)
    assert found.fisher.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(found.fisher[key], expected[key], rtol=1e-3, atol=1e-7)


def test_inputs_and_outputs_may_be_structures():
    model = nn.Linear(2, 3)

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x, scale, note=None):
            return {"logits": self.inner(x) * scale, "note": note, "extra": x}

    x = torch.randn(5, 2)
    plain = FisherStd.estimate(model, [x], num_data=5, likelihood=lambda logits: MostLikely(logits=logits))
    batch = {"x": x, "scale": torch.ones(5, 1), "note": "as it is"}
    for chunk_size in 2, 1:
        found = FisherStd.estimate(
            Wrapped(), [batch], num_data=5, likelihood=lambda logits: MostLikely(logits=logits), output="logits",
            chunk_size=chunk_size,
        )  # fmt: skip
        torch.testing.assert_close(found.fisher["inner.weight"], plain.fisher["weight"])


class LooksAtItsInput(nn.Linear):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


def test_what_vmap_cannot_do_says_so_and_goes_one_by_one():
    model, x = LooksAtItsInput(2, 3), torch.randn(4, 2)
    with pytest.raises(ArgumentError, match=r"LooksAtItsInput.*vmap.*chunk_size=1.*from_adam"):
        FisherStd.estimate(model, loader(x), likelihood="logits")
    assert FisherStd.estimate(model, loader(x), chunk_size=1, likelihood="logits").fisher["weight"].shape == (3, 2)


def test_estimate_says_what_it_misses():
    with pytest.raises(ArgumentError, match=r"Linear.*requires_grad"):
        FisherStd.estimate(nn.Linear(2, 3).requires_grad_(False), [], likelihood="logits")
    with pytest.raises(ArgumentError, match=r"list.*num_data="):
        FisherStd.estimate(nn.Linear(2, 3), [torch.randn(4, 2)], likelihood="logits")
    with pytest.raises(ArgumentError, match="without batches"):
        FisherStd.estimate(nn.Linear(2, 3), [], num_data=4, likelihood="logits")
    with pytest.raises(ValueError, match="Unknown likelihood 'softmax'"):
        FisherStd.estimate(nn.Linear(2, 3), [torch.randn(4, 2)], num_data=4, likelihood="softmax")


# Adam's state


def trained_by_adam(model, gradients, optimizer):
    for gradient in gradients:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
    return optimizer


def two_groups(model, named):
    vectors = [(n, p) for n, p in model.named_parameters() if p.ndim == 1]
    others = [(n, p) for n, p in model.named_parameters() if p.ndim > 1]
    return [{"params": group if named else [p for _, p in group]} for group in (vectors, others)]


def reloaded(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


ADAMS = {
    "optimizer": lambda model: torch.optim.Adam(model.parameters(), 0.0, (0.9, 0.8)),
    "fused": lambda model: torch.optim.AdamW(model.parameters(), 0.0, (0.9, 0.8), fused=True),
    "groups": lambda model: torch.optim.Adam(two_groups(model, named=False), 0.0, (0.9, 0.8)),
    "state_dict": lambda model: torch.optim.Adam(model.parameters(), 0.0, (0.9, 0.8)),
    "state_dict, named groups": lambda model: torch.optim.Adam(two_groups(model, named=True), 0.0, (0.9, 0.8)),
}


@pytest.mark.parametrize("kind", ADAMS)
def test_from_adam_is_the_batch_size_times_the_weighted_mean_of_squared_gradients(kind):
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    optimizer = trained_by_adam(model, [0.5, 3.0], ADAMS[kind](model))
    state = reloaded(optimizer.state_dict()) if kind.startswith("state_dict") else optimizer
    found = FisherStd.from_adam(model, state, num_data=100, batch_size=16)
    # After two steps the second has the weight 1 and the first β₂, and the two of them make up the whole.
    expected = 16 * (0.8 * 0.5**2 + 3.0**2) / 1.8
    assert found.fisher.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found.fisher[name], torch.full_like(parameter, expected))


def test_at_a_minimum_adam_sees_the_square_of_a_batch_as_one_example_over_the_batch_size():
    x = torch.randn(4000, 2)
    y = x @ torch.tensor([[1.0], [-2.0]]) + 0.5 * torch.randn(4000, 1)
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.linalg.lstsq(x, y).solution.T.clone()
    optimizer = torch.optim.Adam(model.parameters(), 0.0)
    for batch in torch.randperm(4000).split(8):
        optimizer.zero_grad()
        (-Normal(model(x[batch]), 0.5).log_prob(y[batch])).mean().backward()
        optimizer.step()
    found = FisherStd.from_adam(model, optimizer, num_data=4000, batch_size=8).fisher["weight"][0]
    torch.testing.assert_close(found, x.square().mean(0) / 0.5**2, rtol=0.25, atol=0)


def test_from_adam_finds_the_number_of_steps_where_the_group_counts_them():
    model = nn.Linear(2, 3)
    state = trained_by_adam(model, [0.5] * 3, torch.optim.Adam(model.parameters(), 0.0)).state_dict()
    expected = FisherStd.from_adam(model, state, num_data=9, batch_size=2).fisher["weight"]
    steps = [entry.pop("step") for entry in state["state"].values()]
    state["param_groups"][0]["step"] = int(steps[0])
    found = FisherStd.from_adam(model, state, num_data=9, batch_size=2).fisher["weight"]
    torch.testing.assert_close(found, expected)


def test_from_adam_takes_the_state_of_an_optimizer_of_the_trainable_parameters_alone():
    model = zoo.PartlyFrozen()
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), 0.0)
    state = trained_by_adam(model, [1.0], optimizer).state_dict()
    assert FisherStd.from_adam(model, state, num_data=9, batch_size=1).fisher.keys() == {"2.weight", "2.bias"}


def test_from_adam_says_what_does_not_fit():
    def complain(match, model, optimizer):
        with pytest.raises(ArgumentError, match=match):
            FisherStd.from_adam(model, optimizer, num_data=10, batch_size=2)

    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    adam = torch.optim.Adam(model.parameters())
    complain("has not made a step", model, adam)
    complain("has not made a step", model, adam.state_dict())
    sgd = trained_by_adam(model, [1.0], torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
    complain(r"`0.weight` is not that of Adam: it holds momentum_buffer.*FisherStd.estimate", model, sgd)
    state = trained_by_adam(model, [1.0], adam).state_dict()
    complain(r"another model: it has 4 parameters, and the model 2", nn.Linear(2, 3), state)
    complain(
        r"`0.weight`, of shape \(3, 3\), it has one of shape \(3, 2\)",
        nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)),
        state,
    )
    complain("none of the model's parameters", copy.deepcopy(model), adam)
    groups = torch.optim.Adam(two_groups(model, named=False))
    complain(r"2 groups .* Make the optimizer", model, trained_by_adam(model, [1.0], groups).state_dict())
    named = trained_by_adam(model, [1.0], torch.optim.Adam(model.named_parameters())).state_dict()
    complain("it names `0.weight`", nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(3, 2)}), named)
    complain(r"`state` and `param_groups`, not dict.*'optimizer'", model, {"optimizer": state})
    with pytest.raises(ArgumentError, match="batch_size"):
        FisherStd.from_adam(model, adam, num_data=10, batch_size=0)


# The conversion


def some_information(model):
    return {name: torch.rand_like(parameter, dtype=torch.float32) for name, parameter in model.named_parameters()}


def expected_std(fisher, name, prior_std=0.3):
    return (fisher.num_data * fisher.fisher[name] + prior_std**-2).rsqrt()


@pytest.mark.parametrize("name", ["mlp", "conv2d", "transposed", "encoder", "lstm", "bilinear", "float64"])
def test_a_conversion_has_exactly_that_std(name):
    model, inputs = zoo.build(name)
    fisher = FisherStd(some_information(model), num_data=50, prior_std=0.3)
    bnn = bnnify.convert(model, prior=bnnify.Pretrained(), posterior_std=fisher)
    for parameter in bayesian_parameters(bnn.module):
        expected = expected_std(fisher, parameter.name).to(parameter.mean.dtype)
        torch.testing.assert_close(std(parameter.rho), expected)
        assert parameter.initial_std.item() == pytest.approx(expected.square().mean().sqrt().item(), rel=1e-5)
    assert bnn(*inputs)[1].isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_for_weights_in_half_precision_it_is_found_and_kept_in_float32(dtype):
    model = nn.Linear(5, 4).to(dtype)
    fisher = FisherStd(some_information(model), num_data=1000, prior_std=0.3)
    rho = bnnify.convert(model, posterior_std=fisher).module.weight_rho
    assert rho.dtype == torch.float32
    torch.testing.assert_close(std(rho), expected_std(fisher, "weight"))


@pytest.mark.parametrize("known", ["embed.weight", "head.weight"])
def test_a_tied_parameter_may_be_known_by_either_name(known):
    model = zoo.TiedLanguageModel()
    information = some_information(model)
    information[known] = information.pop("embed.weight")
    fisher = FisherStd(information, num_data=50, prior_std=0.3)
    bnn = bnnify.convert(model, posterior_std=fisher)
    assert bnn.module.embed.weight_rho is bnn.module.head.weight_rho
    torch.testing.assert_close(std(bnn.module.head.weight_rho), expected_std(fisher, known))


@pytest.mark.parametrize("name", ["mlp", "transposed", "residual_block", "tied_language_model"])
def test_without_information_the_std_is_the_one_given_for_it(name):
    model, _ = zoo.build(name)
    nothing = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.zeros_(parameter)  # whose own size says nothing
    default = bnnify.Relative(0.2, full_width=32)
    for given, rule in (
        ({}, {"posterior_std": default}),
        ({"prior_std": bnnify.Moped(0.3)}, {"posterior_std": bnnify.Moped(0.3)}),
    ):
        bnn = bnnify.convert(model, posterior_std=FisherStd(nothing, num_data=50, **given))
        reference = bnnify.convert(model, **rule)
        pairs = zip(bayesian_parameters(bnn.module), bayesian_parameters(reference.module), strict=True)
        for found, expected in pairs:
            torch.testing.assert_close(std(found.rho), std(expected.rho))


def test_it_may_be_one_rule_among_others():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    fisher = FisherStd(some_information(model), num_data=50, prior_std=0.3)
    bnn = bnnify.convert(model, posterior_std={"1.*": fisher, "0.*": 0.01})
    torch.testing.assert_close(std(bnn.module[0].weight_rho), torch.full((3, 2), 0.01))
    torch.testing.assert_close(std(bnn.module[1].weight_rho), expected_std(fisher, "1.weight"))


def test_the_report_has_it_once_and_without_its_numbers():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    report = str(bnnify.convert(model, posterior_std=FisherStd(some_information(model), num_data=50)).report)
    assert report.count("std=FisherStd(num_data=50, prior_std=") == 1
    assert "tensor" not in report


def test_a_file_restores_std_and_prior_bit_for_bit(tmp_path):
    for dtype in torch.float32, torch.bfloat16:
        model = nn.Sequential(nn.Linear(2, 3), nn.ConvTranspose1d(3, 2, 1)).to(dtype)
        bnn = bnnify.convert(model, posterior_std=FisherStd(some_information(model), num_data=50))
        bnnify.save(bnn, tmp_path / "bnn.pt")
        loaded = bnnify.load(tmp_path / "bnn.pt", copy.deepcopy(model).requires_grad_(True))
        for found, expected in zip(loaded.module.parameters(), bnn.module.parameters(), strict=True):
            assert torch.equal(found, expected)
        assert torch.equal(loaded.kl(), bnn.kl())
        assert bnn.kl() > 0


def test_other_weights_start_with_its_size():
    model = nn.Linear(2, 3)
    bnn = bnnify.convert(model, posterior_std=FisherStd(some_information(model), num_data=50))
    size = std(bnn.module.weight_rho).square().mean().sqrt()
    bnnify.load_weights(bnn, nn.Linear(2, 3).state_dict())
    torch.testing.assert_close(std(bnn.module.weight_rho), size.expand(3, 2))


def test_a_conversion_names_the_parameter_that_does_not_fit():
    def complain(match, model, information, **options):
        with pytest.raises(ConversionError, match=match):
            bnnify.convert(model, posterior_std=FisherStd(information, num_data=50), **options)

    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    information = some_information(model)
    complain(r"no information on `1.bias`, only on 3 others", model, {k: information[k] for k in list(information)[:3]})
    complain(r"`0.weight` has the shape \(4, 2\), and the parameter \(3, 2\)", model, some_information(nn.Sequential(nn.Linear(2, 4), nn.Linear(3, 2))))  # fmt: skip  # noqa: E501
    complain("`0.bias` is negative or NaN", model, information | {"0.bias": torch.full((3,), torch.nan)})
    complain("`0.weight` is on the meta device", copy.deepcopy(model).to("meta"), information)
    frozen = zoo.PartlyFrozen()
    estimated = FisherStd.estimate(frozen, loader(torch.randn(4, 4)), likelihood="logits").fisher
    complain("`0.weight`.*Was it frozen", frozen, estimated, select=["0.weight", "2.weight"])


def test_its_own_arguments_are_checked():
    with pytest.raises(ConversionError, match="num_data"):
        FisherStd({}, num_data=0)
    with pytest.raises(ConversionError, match="posterior_std"):
        FisherStd({}, num_data=1, prior_std=-1.0)
    with pytest.raises(ConversionError, match="knows no names"):
        FisherStd({}, num_data=1, prior_std=FisherStd({}, num_data=1))
    with pytest.raises(ConversionError, match="Unknown posterior_std"):
        bnnify.convert(nn.Linear(2, 2), posterior_std=FisherStd)


def test_a_converted_model_gives_the_information_of_its_mean():
    model, x = nn.Linear(2, 3), torch.randn(5, 2)
    bnn = bnnify.convert(model, select="weight", posterior_std=Relative(0.5))
    torch.manual_seed(1)
    found = FisherStd.estimate(bnn, loader(x), likelihood="logits").fisher
    torch.manual_seed(1)
    torch.testing.assert_close(
        found["weight"], FisherStd.estimate(model, loader(x), likelihood="logits").fisher["weight"]
    )
    assert list(unique_bayesian_parameters(bnn.module))
