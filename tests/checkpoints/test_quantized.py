"""Weights that are quantized in place: named, instead of a model whose biases alone are Bayesian."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import bnnify


class Quantized(Tensor):
    """A weight in int8 that says that it is one in float32, as torchao's are."""

    @staticmethod
    def __new__(cls, values, scale):
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    @classmethod
    def of(cls, weight):
        scale = weight.abs().max() / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def dequantized(self):
        return self.values.float() * self.scale

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(args[0].values, args[0].scale)
        plain = tree_map(lambda arg: arg.dequantized() if isinstance(arg, cls) else arg, (args, kwargs or {}))
        return function(*plain[0], **plain[1])


def by_subclass(layer):
    layer.weight = nn.Parameter(Quantized.of(layer.weight.detach()), requires_grad=False)


def by_integers(layer):
    layer.weight = nn.Parameter(layer.weight.detach().mul(100).to(torch.int8), requires_grad=False)


def by_float8(layer):
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)


QUANTIZE = pytest.mark.parametrize(
    ("quantize", "found"), [(by_subclass, "Quantized"), (by_integers, "torch.int8"), (by_float8, "torch.float8_e4m3fn")]
)


def model_with(quantize):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    quantize(model[0])
    return model


@QUANTIZE
def test_a_quantized_weight_is_refused_by_name_with_the_way_out(quantize, found):
    for options in ({}, {"strict": True}, {"select": "*"}, {"select": "0.weight"}, {"inplace": True}):
        with pytest.raises(bnnify.ConversionError) as error:
            bnnify.convert(model_with(quantize), **options)
        for part in ("`0` (Linear)", found, "convert", "quantize", "`exclude`"):
            assert part in str(error.value)


@QUANTIZE
def test_what_is_not_quantized_can_be_bayesian_beside_it(quantize, found):
    for options in ({"select": "2"}, {"exclude": "0"}, {"select": lambda name, _: name == "2"}):
        bnn = bnnify.convert(model_with(quantize), **options)
        assert [entry.name for entry in bnn.report.bayesian] == ["2.weight", "2.bias"]


def test_a_table_of_integers_that_is_no_weight_is_left_alone():
    model = nn.Sequential(nn.Linear(3, 2))
    model.register_parameter("order", nn.Parameter(torch.arange(4), requires_grad=False))
    assert len(bnnify.convert(model, strict=True).report.bayesian) == 2


def test_parameters_of_a_class_of_the_users_own_are_weights_like_any_other():
    class Named(nn.Parameter):
        pass

    layer = nn.Linear(3, 2)
    layer.weight = Named(layer.weight.detach())
    assert len(bnnify.convert(layer).report.bayesian) == 2
