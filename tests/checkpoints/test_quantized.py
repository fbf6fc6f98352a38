"""Weights that are quantized in place: left alone and named; adapters over them are Bayesian like any others."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import bnnify
from bnnify.distributions.gaussian import std
from bnnify.modules.parameters import bayesian_parameters
from bnnify.report import Reason

from .test_hugging_face import ids, llama


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
def test_a_quantized_layer_is_left_alone_and_named_biases_and_all(quantize, found):
    for options in ({}, {"strict": True}, {"inplace": True}):
        bnn = bnnify.convert(model_with(quantize), **options)
        assert [entry.name for entry in bnn.report.bayesian] == ["2.weight", "2.bias"]
        assert {entry.name: entry.reason for entry in bnn.report.left_alone} == dict.fromkeys(
            ["0.weight", "0.bias"], Reason.QUANTIZED.value
        )
    layer = nn.Sequential(nn.Linear(3, 4))
    quantize(layer[0])
    with pytest.raises(bnnify.ConversionError, match=r"Nothing to convert.*in a quantized layer"):
        bnnify.convert(layer)


@QUANTIZE
def test_a_quantized_weight_that_is_asked_for_is_refused_by_name_with_the_way_out(quantize, found):
    for options in ({"select": "*"}, {"select": "0.weight"}, {"select": lambda name, module: True}):
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


# --- Adapters over a base that a library has quantized ----------------------------------------------------------------


def is_of_base(module, name):
    return isinstance(module, nn.Linear) and "lora_" not in name


def by_torchao(model):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), filter_fn=is_of_base)
    return model


def by_bitsandbytes(make):
    def quantize(model):
        modules = dict(model.named_modules())
        for name, layer in modules.items():
            if is_of_base(layer, name) and name != "lm_head":
                parent, _, attribute = name.rpartition(".")
                setattr(modules[parent], attribute, make(pytest.importorskip("bitsandbytes").nn, layer).to("cpu"))
        return model

    return quantize


def in_4_bits(bnb, layer):
    made = bnb.Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32)
    made.weight = bnb.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
    made.support_avx512bf16_for_cpu = False  # a form for inference, which a forward takes on, and without a backward
    return made


def in_8_bits(bnb, layer):
    made = bnb.Linear8bitLt(layer.in_features, layer.out_features, bias=False, has_fp16_weights=False)
    made.weight = bnb.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    return made


def quantized_then_adapted(quantize):
    return with_lora(quantize(llama(**SIZES)))


def adapted_then_quantized(quantize):
    return quantize(with_lora(llama(**SIZES)))


SIZES = {"hidden_size": 64, "intermediate_size": 64}  # what blockwise quantization needs
LIBRARIES = {
    "torchao, then peft": (by_torchao, quantized_then_adapted),
    "peft, then torchao": (by_torchao, adapted_then_quantized),
    "bitsandbytes in 4 bits": (by_bitsandbytes(in_4_bits), quantized_then_adapted),
    "bitsandbytes in 8 bits": (by_bitsandbytes(in_8_bits), quantized_then_adapted),
}


def with_lora(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


def assert_learns(bnn):
    output, kl = bnn(input_ids=ids(2, 5), labels=ids(2, 5))
    bnnify.elbo(output.loss, kl, num_data=20).backward()
    learned = {name: parameter for name, parameter in bnn.named_parameters() if parameter.requires_grad}
    assert len(learned) == 16  # A, B and their ρ in two layers of two blocks
    assert all(parameter.grad.abs().sum() > 0 for parameter in learned.values())


@pytest.mark.parametrize(("quantize", "make"), LIBRARIES.values(), ids=LIBRARIES)
def test_adapters_over_a_quantized_base_are_bayesian_and_the_base_is_as_it_was(quantize, make, tmp_path):
    model = make(quantize)
    with torch.no_grad():
        plain = model(ids(2, 5)).logits
    bnn = bnnify.convert(model)
    if quantize is by_torchao:  # whose weights can be read: by them goes the σ of the adapters
        wide = bnnify.convert(with_lora(llama(**SIZES)))
        torch.testing.assert_close(bnn.kl(), wide.kl(), rtol=1e-3, atol=0.0)
        for one, other in zip(bayesian_parameters(bnn), bayesian_parameters(wide), strict=True):
            torch.testing.assert_close(std(one.rho), std(other.rho), rtol=0.02, atol=0.0)
    assert {entry.name for entry in bnn.report.bayesian} == {n for n, p in model.named_parameters() if "lora_" in n}
    reasons = {entry.name: entry.reason for entry in bnn.report.left_alone}
    assert reasons["base_model.model.model.layers.0.self_attn.k_proj.weight"] == Reason.QUANTIZED.value
    assert torch.equal(bnn.module(ids(2, 5)).logits, plain)
    with torch.no_grad(), copy.deepcopy(bnn).draw():
        assert torch.equal(bnn.module(ids(2, 5)).logits, plain)
    samples = bnn.sample(ids(2, 5), num_samples=3).logits
    assert not torch.equal(samples[0], samples[1])
    assert bnn.predict(ids(2, 5), num_samples=3, output="logits").mean.shape == plain.shape
    assert_learns(bnn)
    assert torch.equal(bnnify.collapse(bnn)(ids(2, 5)).logits, plain)

    for file in ("x.bnn.pt", "x.bnn.safetensors"):
        with pytest.raises(bnnify.CheckpointError, match=r"q_proj.base_layer.weight`.*are quantized.*strict=False"):
            bnnify.save(bnn, tmp_path / file)
    assert not list(tmp_path.iterdir())
    for parameter in bayesian_parameters(bnn.module):
        parameter.rho.data.add_(1.0)
    names = [parameter.name for parameter in bayesian_parameters(bnn.module)]
    state = bnn.module.state_dict()
    torch.save({n: state[n] for n in state if n.startswith(tuple(names))}, tmp_path / "adapters.pt")
    again = bnnify.convert(model)
    again.module.load_state_dict(torch.load(tmp_path / "adapters.pt"), strict=False)
    assert torch.equal(again.kl(), bnn.kl())


def test_the_base_may_be_quantized_after_the_adapters_became_bayesian():
    bnn = bnnify.convert(with_lora(llama(**SIZES)))
    before = bnn.kl()
    by_torchao(bnn.module)
    assert torch.equal(bnn.kl(), before)
    assert_learns(bnn)
    torchao = pytest.importorskip("torchao.quantization")
    with pytest.raises(bnnify.DrawError, match="Cannot replace `weight`"):  # that of a Bayesian layer
        torchao.quantize_(bnnify.convert(nn.Linear(64, 64)).module, torchao.Int8WeightOnlyConfig())
