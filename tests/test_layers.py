"""Hand-built layers are the converter's own classes: same draw, same weights, same output and KL."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnnify
from bnnify import layers
from bnnify.distributions.gaussian import std
from bnnify.modules.parameters import bayesian_parameters

LAYERS = {
    "linear": (layers.LinearReparameterization, nn.Linear, (4, 3), {}, (2, 4)),
    "conv1d": (
        layers.Conv1dReparameterization,
        nn.Conv1d,
        (2, 4, 3),
        {"padding_mode": "circular", "padding": 1},
        (2, 2, 6),
    ),
    "conv2d": (layers.Conv2dReparameterization, nn.Conv2d, (2, 4, 3), {"stride": 2, "groups": 2}, (2, 2, 6, 6)),
    "conv3d": (layers.Conv3dReparameterization, nn.Conv3d, (2, 4, 2), {"dilation": 2}, (2, 2, 4, 4, 4)),
    "transpose1d": (layers.ConvTranspose1dReparameterization, nn.ConvTranspose1d, (2, 4, 3), {"stride": 2}, (2, 2, 6)),
    "transpose2d": (
        layers.ConvTranspose2dReparameterization,
        nn.ConvTranspose2d,
        (2, 4, 3),
        {"stride": 2, "output_padding": 1, "groups": 2, "padding": 1},
        (2, 2, 5, 5),
    ),
    "transpose3d": (layers.ConvTranspose3dReparameterization, nn.ConvTranspose3d, (2, 3, 2), {}, (1, 2, 3, 3, 3)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def silence(module: nn.Module) -> None:
    for parameter in bayesian_parameters(module):
        parameter.rho.data.fill_(-200.0)


@every_layer
def test_with_sigma_zero_it_is_the_torch_layer(name):
    made, plain, sizes, options, shape = LAYERS[name]
    bias = "1d" in name
    layer, reference = made(*sizes, bias=bias, **options), plain(*sizes, bias=bias, **options)
    assert isinstance(layer, plain)
    reference.load_state_dict({key: layer.state_dict()[key] for key in reference.state_dict()})
    silence(layer)
    x = torch.randn(shape)
    torch.testing.assert_close(layer(x)[0], reference(x))
    collapsed = bnnify.collapse(layer)
    assert type(collapsed) is plain
    torch.testing.assert_close(collapsed(x), reference(x))


@pytest.mark.parametrize("bias", [True, False])
def test_two_calls_are_two_draws_and_the_kl_is_that_of_torch(bias):
    made, _, sizes, options, shape = LAYERS["transpose2d"]
    layer = made(*sizes, prior_mean=0.2, prior_variance=0.25, bias=bias, **options)
    x = torch.randn(shape)
    (first, kl), (second, same_kl) = layer(x), layer(x)
    assert not torch.equal(first, second)
    expected = sum(
        torch.distributions.kl_divergence(
            torch.distributions.Normal(p.mean, std(p.rho)), torch.distributions.Normal(0.2, 0.5)
        ).sum()
        for p in bayesian_parameters(layer)
    )
    torch.testing.assert_close(kl, expected)
    assert torch.equal(kl, same_kl)
    (first.sum() + kl).backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert len(list(layer.parameters())) == (4 if bias else 2)


def test_arguments_stand_in_the_order_of_the_signature():
    linear = layers.LinearReparameterization(2, 3, 0.5, 4.0, 1.0, -2.0, False)
    assert next(bayesian_parameters(linear)).settings.prior == bnnify.Gaussian(mean=0.5, std=2.0)
    assert linear.bias is None
    conv = layers.Conv2dReparameterization(2, 3, 3, 1, 1, 1, 1, 0.5, 4.0, 1.0, -2.0, False)
    assert next(bayesian_parameters(conv)).settings.prior == bnnify.Gaussian(mean=0.5, std=2.0)
    assert (conv.padding, conv.bias) == ((1, 1), None)
    transposed = layers.ConvTranspose2dReparameterization(2, 4, 3, 2, 1, 1, 1, 2, 0.5, 4.0)
    assert (transposed.output_padding, transposed.groups, transposed.dilation) == ((1, 1), 2, (1, 1))


def test_means_and_rhos_start_as_normals_of_std_one_tenth():
    layer = layers.LinearReparameterization(100, 100, posterior_mu_init=0.3, posterior_rho_init=-4.0)
    for parameter, centre in ((layer.weight, 0.3), (layer.weight_rho, -4.0)):
        assert abs(parameter.mean().item() - centre) < 5 * 0.1 / 100
        assert abs(parameter.std().item() - 0.1) < 5 * 0.1 / math.sqrt(2 * 10_000)


def test_dtype_and_device_are_those_asked_for():
    layer = layers.Conv2dReparameterization(2, 3, 3, dtype=torch.float64)
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert {p.device.type for p in layers.LinearReparameterization(2, 2, device="meta").parameters()} == {"meta"}


@pytest.mark.parametrize("variance", [0.0, -1.0, math.inf, math.nan])
def test_a_variance_that_is_none_is_refused(variance):
    with pytest.raises(bnnify.ConversionError, match="prior_variance must be a positive"):
        layers.LinearReparameterization(2, 2, prior_variance=variance)


def test_copies_and_pickles():
    made, _, sizes, options, shape = LAYERS["conv2d"]
    layer, x = made(*sizes, **options), torch.randn(shape)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is made
        outputs = []
        for one in (layer, other):
            torch.manual_seed(0)
            outputs.append(one(x))
        assert torch.equal(outputs[0][0], outputs[1][0])
        assert torch.equal(outputs[0][1], outputs[1][1])


class PlainBlock(nn.Module):
    """The CIFAR ResNet's block: option A pads the shortcut with zeros, option B projects it."""

    Conv: type[nn.Module] = nn.Conv2d

    def __init__(self, inplanes: int, planes: int, option: str) -> None:
        super().__init__()
        self.conv1 = self.Conv(inplanes, planes, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = self.Conv(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.option, self.pad = option, planes - inplanes
        if option == "B":
            self.project, self.bn3 = self.Conv(inplanes, planes, 1, stride=2, bias=False), nn.BatchNorm2d(planes)

    def skip(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad // 2, self.pad - self.pad // 2))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + (self.bn3(self.project(x)) if self.option == "B" else self.skip(x)))


class HandBuiltBlock(PlainBlock):
    """The same block, threading the KL through its forward."""

    Conv = layers.Conv2dReparameterization

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, kl1 = self.conv1(x)
        out, kl2 = self.conv2(F.relu(self.bn1(out)))
        kl, shortcut = kl1 + kl2, self.skip(x) if self.option == "A" else None
        if shortcut is None:
            shortcut, kl3 = self.project(x)
            kl, shortcut = kl + kl3, self.bn3(shortcut)
        return F.relu(self.bn2(out) + shortcut), kl


@pytest.mark.parametrize(
    ("option", "train", "explicit_draw"), [("A", True, False), ("B", True, True), ("B", False, False)]
)
def test_a_hand_built_block_equals_the_converted_plain_block(option, train, explicit_draw):
    hand_built = HandBuiltBlock(3, 8, option).train(train)
    bnn = bnnify.convert(PlainBlock(3, 8, option), prior=bnnify.Gaussian(mean=0.0, std=1.0)).train(train)
    bnnify.load_weights(bnn, hand_built.state_dict())
    x = torch.randn(4, 3, 8, 8)
    torch.manual_seed(1)
    output, kl = bnn(x)
    torch.manual_seed(1)
    if explicit_draw:
        with bnnify.Draw(bayesian_parameters(hand_built)):
            found, found_kl = hand_built(x)
    else:
        found, found_kl = hand_built(x)
    assert torch.equal(found, output)
    torch.testing.assert_close(found_kl, kl)
    gradients = []
    for loss, model in ((output.sum() + kl, bnn.module), (found.sum() + found_kl, hand_built)):
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def test_a_model_with_hand_built_layers_is_not_converted_twice():
    model = nn.Sequential(layers.LinearReparameterization(3, 3), nn.Identity())
    bnn = bnnify.convert(nn.ModuleList([model[0], nn.Linear(2, 2)]))
    assert type(bnn.module[0]) is layers.LinearReparameterization
    assert len(list(bayesian_parameters(bnn.module))) == 4
