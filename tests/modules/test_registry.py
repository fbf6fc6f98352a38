"""Layer types that a user has taught the converter."""

import pytest
import torch
from torch import nn

import bnnify
from bnnify.distributions.gaussian import std
from bnnify.modules import registry
from bnnify.modules.parameters import bayesian_parameters


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    monkeypatch.setattr(registry, "_LAYERS", list(registry._LAYERS))


class LowRank(nn.Module):
    """A layer of no known type, with two weights, a bias that may be None, and a scale that is no weight."""

    def __init__(self, bias=True):
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(4, 2))
        self.bias = nn.Parameter(torch.zeros(4)) if bias else None
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        y = self.scale * (x @ self.down.T @ self.up.T)
        return y if self.bias is None else y + self.bias


class Scaled(nn.Linear):
    """A subclass of a known type with one more weight."""

    def __init__(self):
        super().__init__(3, 2)
        self.factor = nn.Parameter(torch.full((2,), 2.0))

    def forward(self, x):
        return super().forward(x) * self.factor


def bayesian(model, **settings):
    return [entry.name for entry in bnnify.convert(model, **settings).report.bayesian]


@pytest.mark.parametrize("bias", [True, False])
def test_a_registered_type_converts_in_every_place(bias):
    model = nn.Sequential(nn.Linear(3, 3), LowRank(bias))
    assert bayesian(model) == ["0.weight", "0.bias"]
    bnnify.register_layer(LowRank, ["down", "up", "bias"])
    assert bayesian(model) == ["0.weight", "0.bias", "1.down", "1.up"] + ["1.bias"] * bias

    bnn = bnnify.convert(model)
    audit = bnnify.audit(bnn, torch.ones(1, 3))
    assert audit.reached == tuple(bayesian(model))
    assert type(bnnify.collapse(bnn)[1]) is LowRank


def test_a_glob_of_the_class_name_registers_a_type_that_need_not_be_imported():
    bnnify.register_layer(f"{__name__}.Low*", ["down", "up"])
    assert bayesian(LowRank()) == ["down", "up"]
    assert bayesian(type("Derived", (LowRank,), {})()) == ["down", "up"]


def test_names_may_depend_on_the_instance():
    bnnify.register_layer(LowRank, lambda layer: ["up"] if layer.bias is None else ["down"])
    assert bayesian(LowRank(bias=False)) == ["up"]
    assert bayesian(LowRank()) == ["down"]


def test_what_is_registered_last_holds():
    bnnify.register_layer(Scaled, ["factor"])
    assert bayesian(nn.Sequential(Scaled(), nn.Linear(2, 2))) == ["0.factor", "1.weight", "1.bias"]
    bnnify.register_layer(Scaled, ["weight", "bias", "factor"])
    assert bayesian(Scaled()) == ["weight", "bias", "factor"]


def test_not_by_default_means_when_selected():
    bnnify.register_layer(LowRank, ["down", "up"], by_default=False)
    model = nn.Sequential(nn.Linear(3, 3), LowRank())
    assert bayesian(model) == ["0.weight", "0.bias"]
    assert bayesian(model, select="1") == ["1.down", "1.up"]


def test_selecting_a_module_of_an_unknown_type_says_how_to_teach_it():
    with pytest.raises(bnnify.ConversionError, match="register_layer"):
        bnnify.convert(nn.Sequential(LowRank()), select="0")


@pytest.mark.parametrize("layer", [3, int, LowRank()])
def test_what_is_no_layer_type_is_refused(layer):
    with pytest.raises(bnnify.ConversionError, match=r"subclass of torch\.nn\.Module"):
        bnnify.register_layer(layer, ["weight"])


@pytest.mark.parametrize("names", ["weight", [1]])
def test_what_are_no_names_is_refused(names):
    with pytest.raises(bnnify.ConversionError, match="names of parameters"):
        bnnify.register_layer(LowRank, names)


def narrow(model, **settings):
    """The share of the fraction that each weight of the model gets under a full width of 16 units."""
    bnn = bnnify.convert(
        model, prior=bnnify.Pretrained(), posterior_std=bnnify.Relative(1.0, full_width=16), **settings
    )
    rms = {parameter.name: parameter.mean.square().mean().sqrt() for parameter in bayesian_parameters(bnn.module)}
    return {p.name: round((p.initial_std / rms[p.name]).item(), 3) for p in bayesian_parameters(bnn.module)}


@pytest.mark.parametrize(
    ("model", "share"),
    [
        (nn.Linear(30, 4), 0.5),
        (nn.Conv1d(30, 4, 3), 0.5),
        (nn.ConvTranspose2d(30, 4, 3), 0.5),
        (nn.ConvTranspose2d(4, 4, 3, groups=4), 0.5),
        (nn.ConvTranspose2d(4, 30, 3), 1.0),
    ],
)
def test_units_are_counted_along_the_outputs_of_a_layer(model, share):
    assert narrow(model)["weight"] == share


def test_a_registered_type_may_have_its_units_in_another_dimension():
    assert narrow(nn.Sequential(LowRank()), select="*.down") == {"0.down": round((2 / 16) ** 0.5, 3)}
    bnnify.register_layer(LowRank, ["down", "bias"], units_dim=1)
    assert narrow(LowRank())["down"] == round((3 / 16) ** 0.5, 3)


def test_an_elementwise_sigma_comes_back_in_the_layout_of_the_weight():
    model = nn.ConvTranspose1d(2, 3, 4)
    bnn = bnnify.convert(model, posterior_std=bnnify.Moped(0.5))
    expected = (0.5 * model.weight.abs()).clamp(min=1e-6)
    torch.testing.assert_close(std(bnn.module.weight_rho), expected, atol=1e-3, rtol=1e-3)
