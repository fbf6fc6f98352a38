"""Files with the noise on the outputs of layers: its distribution, constant weights, and what cannot have it."""

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnnify


def convolutions():
    torch.manual_seed(0)
    circular = nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="circular", groups=1)
    return nn.Sequential(circular, nn.ReLU(), nn.ConvTranspose2d(4, 4, 2, groups=2), nn.Flatten(), nn.Linear(100, 5))


@pytest.mark.parametrize("form", ["onnx", "torch.export"])
def test_each_layer_adds_the_noise_with_the_variance_that_its_weights_cause(form, tmp_path):
    bnn, path = bnnify.convert(convolutions(), posterior_std=0.1), tmp_path / f"m.{'onnx' if form == 'onnx' else 'pt2'}"
    found = bnnify.export(bnn, path, torch.randn(3, 3, 8, 8), noise="local", likelihood="logits", outputs=["networks"])
    names = ["0.output", "2.output", "4.output"]
    assert found.inputs == ("input", *(f"{name}_noise" for name in names))
    assert set(found.dynamic) == set(found.inputs)
    x, shapes = torch.randn(2, 3, 8, 8), [(2, 4, 4, 4), (2, 4, 5, 5), (2, 5)]
    noise = {name: torch.randn(shape) for name, shape in zip(names, shapes, strict=True)}
    if form == "onnx":
        given = {"input": x.numpy()} | {f"{name}_noise": each.numpy() for name, each in noise.items()}
        value = torch.from_numpy(onnxruntime.InferenceSession(path).run(None, given)[0])
    else:
        value = torch.export.load(path).module()(x, noise=noise)["networks"]
    s = {p.name: F.softplus(p.rho).square() for p in bnnify.modules.bayesian_parameters(bnn.module)}
    m, circular = bnnify.collapse(bnn), {"pad": (1, 1, 1, 1), "mode": "circular"}
    variance = F.conv2d(F.pad(x.square(), **circular), s["0.weight"], s["0.bias"], stride=2)
    hidden = (m[0](x) + variance.sqrt() * noise["0.output"]).relu()
    variance = F.conv_transpose2d(hidden.square(), s["2.weight"], s["2.bias"], groups=2)
    hidden = (m[2](hidden) + variance.sqrt() * noise["2.output"]).flatten(1)
    expected = m[4](hidden) + F.linear(hidden.square(), s["4.weight"], s["4.bias"]).sqrt() * noise["4.output"]
    torch.testing.assert_close(value, expected[None].detach())


def test_all_weights_are_constants_as_with_the_noise_of_weights_they_are_not(tmp_path):
    for noise in ("local", "input"):
        bnnify.export(bnnify.convert(convolutions()), tmp_path / "m.onnx", torch.randn(2, 3, 8, 8), noise=noise)
        graph = onnx.load(tmp_path / "m.onnx").graph
        constants = {tensor.name for tensor in graph.initializer}
        layers = [node for node in graph.node if node.op_type in ("Conv", "ConvTranspose", "Gemm")]
        assert all(set(node.input[1:]) <= constants for node in layers) == (noise == "local")
        assert len(layers) == (6 if noise == "local" else 3)


def test_a_layer_without_noise_is_as_it_is_and_takes_none(tmp_path):
    head = bnnify.convert(convolutions(), select="4.weight")
    found = bnnify.export(head, tmp_path / "m.pt2", torch.randn(2, 3, 8, 8), noise="local")
    assert found.inputs == ("input", "4.output_noise")
    layer = bnnify.convert(nn.Linear(4, 3))
    assert bnnify.export(layer, tmp_path / "m.pt2", torch.ones(2, 4), noise="local").inputs[1:] == ("output_noise",)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(self.layer(x))


@pytest.mark.parametrize(
    ("model", "x", "options", "message"),
    [
        (nn.LSTM(4, 3), torch.ones(5, 2, 4), {}, "`weight_ih_l0` cannot .* LSTM is no Linear .* noise='input'"),
        (Twice(), torch.ones(2, 4), {}, r"`layer` \(Linear\) is called more than once"),
        (nn.Linear(4, 3), torch.ones(2, 4), {"posterior": bnnify.Point()}, "no weight has noise"),
    ],
)
def test_what_has_no_such_form_is_refused_by_name(model, x, options, message, tmp_path):
    with pytest.raises(bnnify.ArgumentError, match=message):
        bnnify.export(bnnify.convert(model, **options), tmp_path / "m.pt2", x, noise="local")
    assert not list(tmp_path.iterdir())
