"""A spread of the models of ``benchmarks.sweep``, each through all of its checks; the whole sweep takes hours."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnnify
from benchmarks.sweep import families
from tests.contract import CHECKS, Case, broken, examine, outputs

SPREAD = {
    "torchvision": """
        efficientnet_b0 googlenet lraspp_mobilenet_v3_large mc3_18 mnasnet0_5 mobilenet_v3_small
        quantized_mobilenet_v2 quantized_shufflenet_v2_x0_5(quantize=False) raft_small regnet_y_400mf
        resnet18 shufflenet_v2_x0_5 squeezenet1_1 ssdlite320_mobilenet_v3_large
    """,
    "timm": """
        ghostnet_050 efficientvit_m0 levit_128s levit_128s(select=attention_biases) mobilevit_xxs pit_ti_224
        test_byobnet test_coatnet test_convnext test_mambaout test_nfnet test_vit
        vit_tiny_patch16_dinov3_qkvb xcit_nano_12_p8_224
    """,
    "transformers": """
        albert bert clip deberta-v2 gpt2 llama mamba mixtral swinv2 t5 wav2vec2 whisper
    """,
}


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family, names in SPREAD.items() for name in names.split()]
)
def test_every_check_of_the_sweep_passes(family, name):
    pytest.importorskip(family)
    case = families.cases(family)[name]
    found = list(examine(case))
    assert {outcome.check: outcome.detail for outcome in found if outcome.status == "fail"} == {}
    reached = {outcome.check for outcome in found} - {"original"}
    assert reached == ({"converts"} if case.refuses else CHECKS.keys())


def test_the_sweep_has_every_builder_of_torchvision_and_every_module_of_timm():
    timm_models = pytest.importorskip("benchmarks.sweep.families.timm_models")
    listed = pytest.importorskip("torchvision.models").list_models()
    assert set(listed) <= families.cases("torchvision").keys()
    names = families.cases("timm").keys()
    assert all(names & set(models) for models in timm_models.modules().values())


class Bypassing(nn.Module):
    """Every read of a weight gets the sample, but this one goes behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + F.linear(x, self.second._parameters["weight"], self.second.bias)


class Caching(nn.Module):
    """What one draw computed from its weight is still there in the next."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.cache = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            return self.layer(x)
        if not self.cache:
            self.cache.append(self.layer.weight * 2)
        return self.layer(x) + F.linear(x, self.cache[0])

    def train(self, mode: bool = True) -> nn.Module:
        self.cache.clear()
        return super().train(mode)


@pytest.mark.parametrize(
    ("model", "promises"), [(Bypassing, {"draw in eval", "draw in train", "gradients"}), (Caching, {"draw in eval"})]
)
def test_the_checks_see_a_parameter_that_bypasses_its_sample(model, promises):
    prior = {"prior": bnnify.Gaussian()}
    case = Case("model", model, lambda model: ((torch.randn(3, 4),), {}), settings=prior)
    assert broken(case).keys() == promises


def test_two_outputs_are_the_same_only_with_the_same_bits_and_the_same_structure():
    x = torch.tensor([1.0, float("nan")])
    assert outputs.difference({"a": [x]}, {"a": [x.clone()]}) == ""
    assert "structure" in outputs.difference({"a": [x]}, {"a": (x,)})
    assert "off by" in outputs.difference(x.new_tensor([1.0]), x.new_tensor([1.0 + 1e-7]))
    assert "leaf 0 is 3" in outputs.difference([3], [4])
    assert "shape" in outputs.difference(x, x[:1])


def test_a_loss_depends_on_every_tensor_of_the_output():
    leaves = [torch.randn(3, requires_grad=True) for _ in range(2)]
    outputs.loss({"a": leaves[0] * 2, "b": [leaves[1] * 3, 7]}).backward()
    assert all((leaf.grad != 0).all() for leaf in leaves)
