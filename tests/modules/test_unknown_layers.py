"""Layers of types that nobody has registered: named as such, and not passed over under `strict`."""

import pytest
import torch
from torch import nn

import bnnify
from bnnify.modules import registry


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    monkeypatch.setattr(registry, "_LAYERS", list(registry._LAYERS))


class MyConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(2, 3, 1)), nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return nn.functional.conv1d(x, self.weight, self.bias)


class Gated(nn.Module):
    """A layer with weights of its own around another module with parameters."""

    def __init__(self):
        super().__init__()
        self.kernel, self.norm = nn.Parameter(torch.ones(3, 3)), nn.LayerNorm(3)


class Adapted(nn.Linear):
    """A subclass of a known layer with more weights."""

    def __init__(self):
        super().__init__(3, 3)
        self.down, self.up = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3, 2))


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(3))


UNKNOWN = {
    "weight": (
        MyConv,
        ["1.weight", "1.bias"],
        'MyConv: register it with bnnify.register_layer(MyConv, ["weight", "bias"])',
    ),
    "matrix beside a norm": (Gated, ["1.kernel"], 'Gated: register it with bnnify.register_layer(Gated, ["kernel"])'),
    "added to a known layer": (
        Adapted,
        ["1.down", "1.up"],
        'Adapted: register it with bnnify.register_layer(Adapted, ["weight", "bias", "down", "up"])',
    ),
    "vector": (Scale, ["1.factor"], 'Scale: register it with bnnify.register_layer(Scale, ["factor"])'),
    "many": (
        lambda: nn.ParameterList(torch.ones(3, 3) for _ in range(9)),
        [f"1.{n}" for n in range(9)],
        'ParameterList, ["0", "1", "2", ',
    ),
}


@pytest.mark.parametrize(("build", "names", "said"), UNKNOWN.values(), ids=UNKNOWN.keys())
def test_an_unknown_layer_type_is_named_with_what_to_do_and_fails_strict(build, names, said):
    model = nn.Sequential(nn.Linear(3, 3), build())
    report = bnnify.convert(model).report
    unsupported = [entry for entry in report.entries if entry.unsupported]
    assert [entry.name for entry in unsupported] == names
    for entry in unsupported:
        assert entry.reason.startswith("unknown layer type ")
        assert "or name the parameter in `select`" in entry.reason
    assert said in unsupported[0].reason
    with pytest.raises(bnnify.ConversionError) as error:
        bnnify.convert(model, strict=True)
    assert f"`{names[0]}`" in str(error.value)
    assert said in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("kind", ["matrix beside a norm", "added to a known layer"])
@pytest.mark.parametrize("way", ["exclude", "freeze", "name", "register"])
def test_each_way_out_satisfies_strict(kind, way):
    build, names, _ = UNKNOWN[kind]
    model, options = nn.Sequential(nn.Linear(3, 3), build()), {}
    if way == "exclude":
        options["exclude"] = names
    if way == "freeze":
        for name in names:
            model.get_parameter(name).requires_grad_(False)
    if way == "name":
        options["select"] = ["0", *names]
    if way == "register":
        own = [name.removeprefix("1.") for name in names]
        bnnify.register_layer(type(model[1]), [*own, "weight", "bias"])
    report = bnnify.convert(model, strict=True, **options).report
    assert ({entry.name for entry in report.bayesian} >= set(names)) == (way in ("name", "register"))


class RMSNorm(nn.Module):
    """A user's own norm; its name says so."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))


class WithTokens(nn.Module):
    """A model with parameters that belong to no layer."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.token, self.temperature = nn.Parameter(torch.ones(1, 1, 3)), nn.Parameter(torch.ones(()))


KNOWN = {
    **{
        norm: (lambda norm=norm: getattr(nn, norm)(4))
        for norm in ("LayerNorm", "RMSNorm", "BatchNorm2d", "SyncBatchNorm", "PReLU")
    },
    "InstanceNorm1d": lambda: nn.InstanceNorm1d(4, affine=True),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "LayerNorm of images": lambda: nn.LayerNorm([3, 4, 4]),
    "Embedding": lambda: nn.Embedding(5, 3),
    "EmbeddingBag": lambda: nn.EmbeddingBag(5, 3),
    "a subclass of a norm": lambda: type("Own", (nn.LayerNorm,), {})(4),
    "a user's norm": RMSNorm,
    "attention with biases to key and value": lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True),
    "tokens and a temperature": WithTokens,
}


def test_what_is_known_but_off_by_default_is_no_want_of_support():
    for build in KNOWN.values():
        report = bnnify.convert(nn.Sequential(nn.Linear(3, 3), build()), strict=True).report
        assert {entry.reason for entry in report.left_alone} == {"not converted by default"}


def test_a_norm_is_not_taken_with_the_module_around_it_but_by_its_own_name():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    assert len(bnnify.convert(model, select="*").report.bayesian) == 2
    assert len(bnnify.convert(model, select=["0", "1.weight"], strict=True).report.bayesian) == 3


def test_parameters_of_an_exported_program_are_known_by_their_use():
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
    program = torch.export.export(model, (torch.randn(2, 4),)).module()
    report = bnnify.convert(program, strict=True).report
    assert [entry.name for entry in report.bayesian] == ["0.weight", "0.bias"]
