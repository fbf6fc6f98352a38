"""What becomes Bayesian: defaults, globs, functions, ties, frozen parameters, settings by pattern, and the report."""

from fnmatch import fnmatchcase

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnnify
from bnnify import ConversionReport, Gaussian, Pretrained, Relative
from bnnify.distributions.gaussian import std
from bnnify.modules import patterns
from bnnify.report import ReportEntry


class Everything(nn.Module):
    """One of each kind of layer, some of them in containers, and a parameter that belongs to no layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.encoder = nn.ModuleDict(
            {
                "conv": nn.Conv1d(4, 4, 3),
                "norm": nn.LayerNorm(4),
                "blocks": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4, bias=False)]),
            }
        )
        self.attention = nn.MultiheadAttention(4, 2)
        self.recurrent = nn.GRU(4, 4)
        self.batch_norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(2))


class TiedHead(nn.Module):
    """A language model in miniature: the embedding comes first, the head has its weight."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.embed(tokens))


class Shared(nn.Module):
    """One layer, known under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.other = nn.Linear(4, 4)


BLOCKS = {"encoder.blocks.0.weight", "encoder.blocks.0.bias", "encoder.blocks.1.weight"}
HEAD = {"head.weight", "head.bias"}
CONV = {"encoder.conv.weight", "encoder.conv.bias"}
RECURRENT = {f"recurrent.{name}_l0" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
ATTENTION = {f"attention.{name}" for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")}
DEFAULT = BLOCKS | HEAD | CONV | RECURRENT | ATTENTION


def is_linear(name, module):
    return isinstance(module, nn.Linear)


def bayesian_names(bnn):
    """The Bayesian parameters, from the names in the state dict."""
    return {name.removesuffix("_rho") for name in bnn.module.state_dict() if name.endswith("_rho")}


def reported(bnn):
    return {entry.name for entry in bnn.report.bayesian}


# What is selected


def test_by_default_layers_are_converted_and_norms_embeddings_and_bare_parameters_are_not():
    bnn = bnnify.convert(Everything())
    assert bayesian_names(bnn) == reported(bnn) == DEFAULT


def test_each_kind_of_layer_has_its_weights_converted_also_as_the_root():
    for layer, names in [
        (nn.Linear(3, 2), {"weight", "bias"}),
        (nn.Bilinear(3, 2, 4), {"weight", "bias"}),
        *[(conv(2, 2, 3), {"weight", "bias"}) for conv in (nn.Conv1d, nn.Conv2d, nn.Conv3d)],
        *[(conv(2, 2, 3), {"weight", "bias"}) for conv in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)],
        (nn.Conv2d(2, 2, 3, bias=False), {"weight"}),
        (nn.LSTMCell(2, 3), {"weight_ih", "weight_hh", "bias_ih", "bias_hh"}),
        (
            nn.LSTM(2, 3, proj_size=1),
            {f"{name}_l0" for name in ("weight_ih", "weight_hh", "weight_hr", "bias_ih", "bias_hh")},
        ),
        (
            nn.MultiheadAttention(4, 2, kdim=3, add_bias_kv=True),
            {"q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"},
        ),
    ]:
        assert bayesian_names(bnnify.convert(layer)) == names


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ("head", HEAD),
        ("encoder.blocks.0", {"encoder.blocks.0.weight", "encoder.blocks.0.bias"}),
        ("encoder.*", BLOCKS | CONV),
        ("*.blocks.?", BLOCKS),
        ("enc*[rv]", BLOCKS | CONV),
        ("attention.out_proj", {"attention.out_proj.weight", "attention.out_proj.bias"}),
        ("head.weight", {"head.weight"}),
        ("*.blocks.*.weight", {"encoder.blocks.0.weight", "encoder.blocks.1.weight"}),
        ("scale", {"scale"}),
        ("*", DEFAULT | {"embed.weight"}),
        (("head", "encoder.conv.bias"), HEAD | {"encoder.conv.bias"}),
        (lambda name, module: name.startswith("encoder"), BLOCKS | CONV),
        (lambda name, module: isinstance(module, nn.Embedding), {"embed.weight"}),
        (is_linear, BLOCKS | HEAD | {"attention.out_proj.weight", "attention.out_proj.bias"}),
    ],
)
def test_select_takes_layers_by_module_and_parameters_by_their_own_name(select, expected):
    bnn = bnnify.convert(Everything(), select=select)
    assert bayesian_names(bnn) == reported(bnn) == expected


@pytest.mark.parametrize(
    ("model", "name", "read"),
    [
        (nn.ParameterList([torch.ones(3), torch.ones(3)]), "1", lambda holder: holder[1]),
        (nn.ParameterDict({"gate": torch.ones(3)}), "gate", lambda holder: holder["gate"]),
    ],
    ids=["ParameterList", "ParameterDict"],
)
def test_parameters_in_containers_of_parameters_can_be_selected(model, name, read):
    bnn = bnnify.convert(model, select=name)
    assert bayesian_names(bnn) == {name}
    with bnn.draw():
        drawn = read(bnn.module)
    assert not torch.equal(drawn, read(bnn.module))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_elements_are_left_alone():
    bnn = bnnify.convert(nn.Sequential(nn.Linear(3, 0), nn.Linear(0, 2)), select=["0.weight", "1"])
    assert bayesian_names(bnn) == {"1.bias"}
    assert {entry.reason for entry in bnn.report.left_alone} == {"it has no elements"}


# Frozen parameters


def test_frozen_parameters_keep_their_values_unless_named_themselves():
    model = Everything()
    model.encoder.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    assert bayesian_names(bnnify.convert(model)) == DEFAULT - BLOCKS - CONV - {"head.bias"}
    assert bayesian_names(bnnify.convert(model, select="*")) == DEFAULT - BLOCKS - CONV - {"head.bias"} | {
        "embed.weight"
    }
    assert bayesian_names(bnnify.convert(model, select=is_linear)) == {
        "head.weight",
        "attention.out_proj.weight",
        "attention.out_proj.bias",
    }
    by_name = bnnify.convert(model, select=["head.weight", "head.bias"])
    assert bayesian_names(by_name) == HEAD
    assert not by_name.module.head.bias.requires_grad
    assert by_name.module.head.bias_rho.requires_grad


# Ties


@pytest.mark.parametrize(
    "select",
    [None, "embed", "head", "embed.weight", "head.weight", is_linear],
    ids=lambda s: getattr(s, "__name__", str(s)),
)
def test_a_tied_weight_is_one_posterior_whichever_name_selects_it(select):
    bnn = bnnify.convert(TiedHead(), select=select)
    model = bnn.module
    assert model.embed.weight is model.head.weight
    assert model.embed.weight_rho is model.head.weight_rho
    with bnn.draw():
        assert model.embed.weight is model.head.weight
        assert not torch.equal(model.embed.weight, model._modules["embed"]._parameters["weight"])
    assert [entry.name for entry in bnn.report.bayesian if "weight" in entry.name] == ["embed.weight"]


def test_a_tie_to_what_is_not_selected_by_default_still_selects():
    model = nn.Module()
    model.norm = nn.LayerNorm(4)
    model.linear = nn.Linear(4, 4)
    model.linear.bias = model.norm.bias
    assert bayesian_names(bnnify.convert(model)) == {"norm.bias", "linear.weight", "linear.bias"}


@pytest.mark.parametrize(
    "select", [None, ["first", "other"], ["second", "other"], ["second.weight", "second.bias", "other"]], ids=str
)
def test_a_module_with_two_names_is_converted_once_under_either(select):
    bnn = bnnify.convert(Shared(), select=select, prior=Gaussian())
    model = bnn.module
    assert model.first is model.second
    once = nn.ModuleList([bnnify.collapse(model.first), bnnify.collapse(model.other)])
    torch.testing.assert_close(bnn.kl(), bnnify.convert(once, prior=Gaussian()).kl())
    assert [entry.name for entry in bnn.report.entries] == ["first.weight", "first.bias", "other.weight", "other.bias"]


def test_a_function_is_asked_about_each_name_of_a_shared_module():
    asked = []
    bnnify.convert(Shared(), select=lambda name, module: asked.append(name) or name == "second")
    assert {"first", "second", "other"} <= set(asked)
    assert bayesian_names(bnnify.convert(Shared(), select=lambda name, module: name == "second")) == {
        f"{layer}.{name}" for layer in ("first", "second") for name in ("weight", "bias")
    }


# Settings by pattern


def initial(bnn, name):
    return std(bnn.module.get_parameter(f"{name}_rho").detach())


def test_settings_may_be_given_by_pattern_and_the_first_that_matches_holds():
    model = Everything()
    bnn = bnnify.convert(
        model,
        prior={"head": Gaussian(std=0.1), "*.weight": Gaussian(std=2.0)},
        posterior_std={"head.bias": 0.5, "head.*": 0.01, "encoder": Relative(0.4)},
        estimator={"*": "reparameterization"},
    )
    settings = {entry.name: entry.settings for entry in bnn.report.bayesian}
    for name in HEAD:
        assert f"prior={Gaussian(std=0.1)}" in settings[name]
    assert f"prior={Gaussian(std=2.0)}" in settings["encoder.conv.weight"]
    assert f"prior={Pretrained()}" in settings["encoder.conv.bias"]
    assert "head.weight_prior_mean" not in bnn.module.state_dict()
    assert "encoder.conv.bias_prior_mean" in bnn.module.state_dict()
    torch.testing.assert_close(initial(bnn, "head.bias"), torch.full((2,), 0.5))
    torch.testing.assert_close(initial(bnn, "head.weight"), torch.full((2, 4), 0.01))
    conv, gru = model.encoder["conv"].weight.detach(), model.recurrent.weight_hh_l0.detach()
    torch.testing.assert_close(initial(bnn, "encoder.conv.weight"), (0.4 * conv.square().mean().sqrt()).expand_as(conv))
    default = bnnify.convert(model)
    torch.testing.assert_close(initial(bnn, "recurrent.weight_hh_l0"), initial(default, "recurrent.weight_hh_l0"))
    assert initial(bnn, "recurrent.weight_hh_l0").shape == gru.shape


def test_a_pattern_for_a_tied_weight_may_use_any_of_its_names():
    for pattern in ("embed", "head.weight"):
        bnn = bnnify.convert(TiedHead(), posterior_std={pattern: 0.25})
        torch.testing.assert_close(initial(bnn, "embed.weight"), torch.full((7, 4), 0.25))


# Converting again


def classes(model):
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("again", [lambda bnn: bnn, lambda bnn: bnn.module], ids=["the wrapper", "its module"])
@pytest.mark.parametrize("inplace", [False, True])
def test_converting_again_nests_nothing_and_changes_nothing(again, inplace):
    bnn = bnnify.convert(Everything(), prior=Gaussian(std=0.3))
    bnn.origin = "a file"
    twice = bnnify.convert(again(bnn), inplace=inplace)
    assert twice.origin == (bnn.origin if again(bnn) is bnn else None)
    assert isinstance(twice, bnnify.BayesianModel)
    assert not isinstance(twice.module, bnnify.BayesianModel)
    assert classes(twice.module) == classes(bnn.module)
    assert (twice.module is bnn.module) == inplace
    torch.testing.assert_close(dict(twice.module.state_dict()), dict(bnn.module.state_dict()))
    assert torch.equal(twice.kl(), bnn.kl())
    assert reported(twice) == DEFAULT
    assert [entry.name for entry in twice.report.entries] == [entry.name for entry in bnn.report.entries]
    assert classes(bnnify.collapse(twice)) == classes(Everything())


def test_what_is_bayesian_stays_so_when_converting_again_selects_something_else():
    bnn = bnnify.convert(Everything(), select="encoder")
    assert reported(bnnify.convert(bnn, select="head")) == BLOCKS | CONV | HEAD


def test_rho_and_prior_means_cannot_be_selected():
    bnn = bnnify.convert(nn.Linear(4, 4))
    for pattern in ("weight_rho", "*_prior_mean"):
        with pytest.raises(bnnify.ConversionError, match="matches nothing"):
            bnnify.convert(bnn, select=pattern)


def test_a_converted_submodule_keeps_its_posterior_and_counts_once():
    inner = bnnify.convert(nn.Linear(4, 4), prior=Gaussian(std=0.3), posterior_std=0.05)
    outer = nn.Sequential(inner.module, nn.Linear(4, 2))
    bnn = bnnify.convert(outer, prior={"1": Gaussian()})
    rest = bnnify.convert(outer[1], prior=Gaussian())
    assert bayesian_names(bnn) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    torch.testing.assert_close(bnn.kl(), inner.kl() + rest.kl())
    torch.testing.assert_close(initial(bnn, "0.weight"), torch.full((4, 4), 0.05))


def test_more_of_a_converted_layer_can_be_converted_later():
    weight_only = bnnify.convert(nn.Linear(4, 4), select="weight", posterior_std=0.05)
    both = bnnify.convert(weight_only, select="bias", posterior_std=0.5)
    assert bayesian_names(both) == {"weight", "bias"}
    torch.testing.assert_close(initial(both, "weight"), torch.full((4, 4), 0.05))
    torch.testing.assert_close(initial(both, "bias"), torch.full((4,), 0.5))
    assert classes(bnnify.collapse(both)) == [nn.Linear]
    x = torch.ones(1, 4)
    with both.draw():
        assert torch.equal(both.module(x), F.linear(x, both.module.weight, both.module.bias))


REFUSED_CHANGES = {
    "another prior": ({"prior": Gaussian(std=1.0)}, "prior= for `0.weight`", "prior=Gaussian(mean=0.0, std=0.3)"),
    "another prior for some": ({"prior": {"0.bias": Pretrained()}}, "prior= for `0.bias`", "std=0.3"),
    "another sigma": ({"posterior_std": 1e-6}, "posterior_std= for `0.weight`", "a σ, which has had its start"),
    "the same sigma, which training has moved": ({"posterior_std": 0.05}, "posterior_std= for `0.weight`", "a σ"),
    "another estimator": ({"estimator": "local"}, "estimator= for `0.weight`", "estimator='reparameterization'"),
    "no noise": ({"posterior": {"0": bnnify.Point()}}, "posterior= for `0.weight`", "posterior=MeanField()"),
    "to be left alone": ({"exclude": "0.weight"}, "exclude= for `0.weight`", "a posterior"),
    "to be left alone, all of it": ({"exclude": ["0", "1"]}, "exclude= for `0.weight`", "a posterior"),
    "another prior where it is selected": ({"select": "0", "prior": Gaussian()}, "prior= for `0.weight`", "std=0.3"),
}


@pytest.mark.parametrize(("options", "named", "has"), REFUSED_CHANGES.values(), ids=REFUSED_CHANGES.keys())
def test_an_option_that_would_change_what_is_bayesian_is_refused(options, named, has):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    bnn = bnnify.convert(model, select="0", prior=Gaussian(std=0.3), posterior_std=0.05)
    before = {name: tensor.clone() for name, tensor in bnn.state_dict().items()}
    with pytest.raises(bnnify.ConversionError) as error:
        bnnify.convert(bnn, **options, inplace=True)
    for part in (f"Cannot follow {named}", has, "collapse first"):
        assert part in str(error.value)
    assert bnn.state_dict().keys() == before.keys()
    assert classes(bnn.module)[2] is nn.Linear


@pytest.mark.parametrize(
    "options",
    [
        {"prior": Gaussian(std=0.3)},
        {"estimator": "reparameterization"},
        {"select": "1", "prior": Gaussian(), "posterior_std": 0.2, "estimator": "local"},
        {"prior": {"1": Gaussian()}, "posterior_std": {"1": 0.2}, "estimator": {"1.*": "local"}},
        {"exclude": "1"},
    ],
    ids=str,
)
def test_an_option_for_what_is_new_or_that_changes_nothing_is_followed(options):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    first = bnnify.convert(model, select="0", prior=Gaussian(std=0.3), posterior_std=0.05)
    bnn = bnnify.convert(first, **options)
    assert bnn.report.entries[:2] == first.report.entries[:2]
    assert torch.equal(bnn.module[0].weight_rho, first.module[0].weight_rho)
    if options != {"exclude": "1"}:
        fresh = bnnify.convert(model, **{name: value for name, value in options.items() if name != "select"})
        assert bnn.report.entries[2:] == fresh.report.entries[2:]


def test_options_with_which_nothing_is_left_to_convert_are_refused():
    for options in [{"select": "1"}, {"select": "1", "prior": Gaussian()}]:
        bnn = bnnify.convert(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
        with pytest.raises(bnnify.ConversionError, match="Nothing to convert"):
            bnnify.convert(bnn, **options)
        assert reported(bnnify.convert(bnn)) == {"0.weight", "0.bias"}


def test_an_option_is_for_what_is_frozen_or_off_by_default_too_once_that_is_bayesian():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    for name, frozen in (("0.weight", True), ("1.weight", False)):
        bnn = bnnify.convert(model, select=name)
        bnn.module.get_parameter(name).requires_grad_(not frozen)
        with pytest.raises(bnnify.ConversionError, match=f"Cannot follow prior= for `{name}`"):
            bnnify.convert(bnn, prior=Gaussian())


def test_a_new_head_is_added_to_a_converted_model():
    bnn = bnnify.convert(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    with torch.no_grad():
        bnn.module[0].weight_rho.add_(1.0)
    bnn.module[1] = nn.Linear(4, 7)
    again = bnnify.convert(bnn, prior={"1": Gaussian(std="learned")})
    assert torch.equal(again.module[0].weight_rho, bnn.module[0].weight_rho)
    assert "learned" in again.report.bayesian[2].settings
    assert again(torch.ones(1, 4))[0].shape == (1, 7)


def test_a_weight_tied_to_a_converted_one_joins_its_posterior():
    model = TiedHead()
    bnnify.convert(model.head, inplace=True, posterior_std=0.05)
    assert "weight_rho" not in model.embed._parameters
    bnn = bnnify.convert(model, inplace=True)
    assert model.embed.weight_rho is model.head.weight_rho
    torch.testing.assert_close(initial(bnn, "embed.weight"), torch.full((7, 4), 0.05))


# How long it takes


def test_patterns_are_compared_with_names_that_begin_as_they_do(monkeypatch):
    compared = []
    monkeypatch.setattr(patterns, "fnmatchcase", lambda name, glob: compared.append(name) or fnmatchcase(name, glob))
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(2, 2) for _ in range(200))})
    names = [name for name, _ in model.named_parameters()]
    by_layer = {f"layers.{number}.*": Gaussian(std=1.0 + number) for number in range(200)}
    bnn = bnnify.convert(model, select=names, exclude=names[-1], prior=by_layer | {"*": Gaussian()})
    assert len(compared) < 40 * len(names)
    for entry in bnn.report.bayesian:
        assert f"std={1.0 + int(entry.name.split('.')[1])}" in entry.settings


# The report


def test_the_report_has_each_parameter_once_in_order_with_what_happened_to_it():
    model = Everything()
    model.head.bias.requires_grad_(False)
    report = bnnify.convert(model).report
    entries = {entry.name: entry for entry in report.entries}
    assert list(entries) == [name for name, _ in model.named_parameters()]
    assert {entry.name for entry in report.left_alone} | {entry.name for entry in report.bayesian} == set(entries)
    assert all(entries[name].shape == tuple(parameter.shape) for name, parameter in model.named_parameters())
    assert all(entries[name].numel == parameter.numel() for name, parameter in model.named_parameters())
    assert all(bool(entry.reason) != entry.bayesian == bool(entry.settings) for entry in report.entries)
    assert (entries["head.weight"].module, entries["scale"].module) == ("Linear", "Everything")
    assert entries["head.bias"].reason.startswith("frozen (requires_grad=False)")
    for name in ("embed.weight", "scale", "batch_norm.weight", "encoder.norm.bias"):
        assert entries[name].reason == "not converted by default"
    selected = bnnify.convert(model, select="encoder").report
    for entry in selected.left_alone:
        assert ("no weights are known" if "encoder" in entry.name else "not selected") in entry.reason
    assert not any(entry.unsupported for entry in (*report.entries, *selected.entries))


def test_the_report_prints_as_a_table_with_totals():
    model = nn.Sequential(nn.Linear(30, 50), nn.LayerNorm(50))
    report = bnnify.convert(model, prior=Gaussian(std=0.3), posterior_std=Relative(0.1)).report
    assert str(report).splitlines() == [
        f"Bayesian: reparameterization, prior={Gaussian(std=0.3)}, std={Relative(0.1)}",
        "  0  Linear     weight [50, 30], bias [50]  1,550",
        "",
        "Left alone: not converted by default",
        "  1  LayerNorm  weight [50], bias [50]        100",
        "",
        "2 of 4 parameters Bayesian, 1,550 of 1,650 weights (93.9%)",
        "memory of the parameters: 6.4 KiB before, 12.5 KiB after",
    ]


def test_the_report_knows_the_memory_that_the_conversion_adds():
    model = nn.Sequential(nn.Linear(30, 50), nn.LayerNorm(50))
    for prior in (Gaussian(), Pretrained()):
        bnn = bnnify.convert(model, prior=prior)
        assert bnn.report.memory_before == sum(parameter.nbytes for parameter in model.parameters())
        assert bnn.report.memory_after == sum(parameter.nbytes for parameter in bnn.parameters())


def numbered(*names):
    """A report on equal layers with these names."""
    return ConversionReport(tuple(ReportEntry(f"{name}.weight", "Linear", (2, 2), True) for name in names))


@pytest.mark.parametrize(
    ("names", "rows"),
    [
        (["blocks.0.fc", "blocks.1.fc", "blocks.3.fc"], ["blocks.{0-1,3}.fc"]),
        (["layer_0.fc1", "layer_0.fc2", "layer_1.fc1", "layer_1.fc2"], ["layer_{0-1}.fc1", "layer_{0-1}.fc2"]),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0", "a.1.b.1"], ["a.{0-1}.b.{0-1}"]),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0"], ["a.0.b.{0-1}", "a.1.b.0"]),
        (["a.0", "b.0"], ["a.0", "b.0"]),
    ],
)
def test_like_layers_of_several_blocks_share_a_row(names, rows):
    lines = str(numbered(*names)).splitlines()
    assert [line.split()[0] for line in lines[1:-3]] == rows
    assert sum(int(line.split()[-1]) for line in lines[1:-3]) == 4 * len(names)


def test_the_report_of_four_hundred_layers_can_be_read():
    blocks = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), nn.LayerNorm(4)) for _ in range(200)]
    report = bnnify.convert(nn.Sequential(*blocks)).report
    assert len(report.entries) == 1200
    assert len(str(report).splitlines()) == 9
