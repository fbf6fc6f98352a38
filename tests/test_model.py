"""The wrapper of a converted model: what it gives to an optimizer."""

from torch import nn

import bnnify


def test_weight_decay_is_for_what_no_prior_pulls_on_and_each_trainable_parameter_is_in_one_group():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    model[2].bias.requires_grad_(False)
    bnn = bnnify.convert(model, select=["0", "2.weight"])
    groups = bnn.parameter_groups(lr=0.1, rho_lr=0.2, weight_decay=0.3)
    settings = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert settings == {"means": (0.1, 0.0), "rho": (0.2, 0.0), "deterministic": (0.1, 0.3)}
    names = {id(parameter): name for name, parameter in bnn.module.named_parameters()}
    found = {group["name"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}
    assert found["means"] == {"0.weight", "0.bias", "2.weight"}
    assert found["rho"] == {f"{name}_rho" for name in found["means"]}
    assert found["deterministic"] == {"1.weight", "1.bias"}
    assert {group["lr"] for group in bnn.parameter_groups(lr=0.1)} == {0.1}
