"""Networks in int8: they share the scales of activations, stay near the floats, and leave as files."""

import copy
import sys
from collections import Counter

import onnxruntime
import pytest
import torch
from torch import nn

import bnnify
from benchmarks.harness import data
from benchmarks.harness.networks import cifar_resnet

pytest.importorskip("torchao")

K = 3


class Residual(nn.Module):
    """Convolutions with and without ReLU, a sum, a mean, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.two = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.fc = nn.Linear(8, 5)

    def forward(self, image):
        hidden = self.one(image)
        return self.fc(torch.relu(self.two(hidden) + hidden).mean((-2, -1)))


def images(rows=32):
    return torch.randn(rows, 3, 8, 8)


def frozen(model=None, **options):
    model = (Residual() if model is None else model).eval()
    return bnnify.freeze(bnnify.convert(model, **{"posterior_std": 0.05, **options}), K).eval()


def calls(graph, operator):
    """The arguments of each call of an operator that rounds, or that takes it back."""
    target = getattr(torch.ops.quantized_decomposed, operator).default
    return [node.args for node in graph.module.graph.nodes if node.target is target]


def weights(graph):
    """The integer weights that the graph holds."""
    names = {weight.target for weight, *_ in calls(graph, "dequantize_per_channel")}
    return [getattr(graph.module, name) for name in names]


def mutual_information(logits):
    probabilities = logits.softmax(-1)
    expected = torch.special.entr(probabilities).sum(-1).mean(0)
    return torch.special.entr(probabilities.mean(0)).sum(-1) - expected


def correlation(one, other):
    return torch.corrcoef(torch.stack([one, other]))[0, 1].item()


@pytest.mark.parametrize(
    ("select", "activations", "held"), [("*", 4 * K, 3 * K), ("two.*", 1 + 3 * K, 2 + K), ("fc.*", 4, 2 + K)]
)
def test_all_networks_share_the_scale_of_each_activation_and_have_their_own_weights(select, activations, held):
    quantized = bnnify.quantize(frozen(select=select), [images()])
    scales = Counter(tuple(scale) for _, *scale in calls(quantized, "quantize_per_tensor"))
    # The image, the outputs of both convolutions, the sum, and the mean.
    assert len(scales) == 5
    assert sum(scales.values()) == 1 + activations
    assert [weight.dtype for weight in weights(quantized)] == [torch.uint8] * held


@torch.no_grad()
def test_scales_cover_all_batches_and_all_networks():
    ensemble = frozen(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
    ensemble.networks[-1][0].weight.mul_(100)
    x = torch.randn(64, 4)
    quantized = bnnify.quantize(ensemble, iter([x / 100, x]))
    for found, expected in zip(quantized(x), ensemble(x), strict=True):
        assert (found - expected).abs().max() < 0.02 * ensemble(x).abs().max()
    assert quantized(x)[0].unique().numel() < quantized(x)[-1].unique().numel()


@pytest.mark.parametrize("weights_only", [False, True])
@torch.no_grad()
def test_it_computes_about_what_the_networks_do_and_the_logits_are_not_rounded(weights_only):
    ensemble, x = frozen(), images(1000)
    quantized = bnnify.quantize(ensemble, [images()], weights_only=weights_only)
    found, expected = quantized(x), ensemble(x)
    assert 0 < (found - expected).abs().max() < 0.1 * expected.std()
    assert correlation(mutual_information(found), mutual_information(expected)) > 0.99
    assert found.unique().numel() > 256
    assert bool(calls(quantized, "quantize_per_tensor")) != weights_only


class Embedded(nn.Module):
    """Layers that transformers have."""

    def __init__(self):
        super().__init__()
        self.embed, self.attention = nn.Embedding(9, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.zeros(8))
        self.head = nn.Linear(8, 5)

    def forward(self, tokens):
        hidden = self.embed(tokens)
        mixed = self.attention(hidden, hidden, hidden)[0]
        projected = torch.addmm(self.bias, mixed.flatten(0, 1), self.weight).view_as(mixed)
        return {"logits": self.head(mixed), "hidden": hidden, "projected": projected}


@torch.no_grad()
def test_weights_alone_are_rounded_channel_by_channel_and_are_all_integers():
    tokens, model = torch.randint(0, 9, (4, 6)), Embedded()
    model.head.weight[0] *= 1000  # must not take digits from the other channels
    model.weight[:, 0] *= 1000
    ensemble = frozen(model)
    quantized = bnnify.quantize(ensemble, [{"tokens": tokens}], weights_only=True)
    found, expected = quantized(tokens=tokens), ensemble(tokens=tokens)
    for name in ("logits", "hidden", "projected"):
        error = (found[name] - expected[name]).abs().amax((0, 1, 2))
        assert (error < 0.03 * expected[name].abs().amax((0, 1, 2))).all()
    assert len(weights(quantized)) == 2 + 3 * K  # the table and `weight` are not Bayesian
    assert max(tensor.numel() for tensor in quantized.parameters()) == 3 * 8  # biases


@torch.no_grad()
def test_the_output_and_the_sizes_are_chosen_as_for_a_graph_of_floats():
    ensemble = frozen(Embedded())
    quantized = bnnify.quantize(ensemble, [torch.randint(0, 9, (4, 6))], output="logits")
    assert quantized(torch.randint(0, 9, (7, 6))).shape == (K, 7, 6, 5)
    with pytest.raises(bnnify.ArgumentError, match=r"size that the example has fixed.*dynamic_shapes"):
        quantized(torch.randint(0, 9, (4, 5)))


@torch.no_grad()
def test_the_model_stays_as_it_is_and_the_result_is_a_module_as_others():
    bnn = bnnify.convert(Residual())
    state, ensemble = copy.deepcopy(bnn.state_dict()), bnnify.freeze(bnn, K)
    before = copy.deepcopy(ensemble.state_dict())
    torch.manual_seed(1)
    drawn = bnnify.quantize(bnn, [(images(), torch.zeros(32))], num_samples=2)
    assert bnn.training
    assert drawn.num_samples == 2
    bnnify.quantize(ensemble, [images()])
    for found, expected in ((bnn, state), (ensemble, before)):
        assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())
    x = images(2)
    assert torch.equal(copy.deepcopy(drawn).train().eval()(x), drawn(x))


@pytest.mark.parametrize("ending", ["onnx", "pt2", "pte"])
def test_a_file_holds_the_integers_and_computes_about_what_the_graph_does(ending, tmp_path):
    if ending == "pte":
        pytest.importorskip("executorch.runtime", exc_type=ImportError)
    model, path = nn.Sequential(Residual(), nn.Linear(5, 600), nn.ReLU(), nn.Linear(600, 600)), tmp_path / f"m.{ending}"
    ensemble, x = frozen(model), images(4)
    quantized = bnnify.quantize(ensemble, [images()])
    written = bnnify.export(quantized, path, x, likelihood="logits")
    assert written.num_samples == K
    assert written.outputs == ("mean", "predictive_entropy", "mutual_information")
    least = sum(tensor.nbytes for tensor in (*quantized.parameters(), *quantized.buffers()))
    assert least < written.nbytes < 0.5 * sum(p.nbytes for p in ensemble.parameters())
    assert written.max_difference < 0.01
    if ending == "onnx":
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        session = onnxruntime.InferenceSession(path, options)
        mean = torch.from_numpy(session.run(["mean"], {"input": images(7).numpy()})[0])
        assert mean.shape == (7, 600)
        import onnx

        layers = Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
        assert layers["QLinearConv"] == 2 * K  # it computes in integers, too
        assert layers["Conv"] == 0


def test_a_runtime_that_is_further_from_the_graph_than_integers_explain_is_refused(tmp_path, monkeypatch):
    quantized = bnnify.quantize(frozen(), [images()])
    exact, _ = quantized.rounded
    quantized.rounded = exact, exact
    with pytest.raises(bnnify.ExportError, match="computes `networks` otherwise than the networks"):
        bnnify.export(quantized, tmp_path / "model.onnx", images(64))
    assert not list(tmp_path.iterdir())


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else x


class ReadTwice(nn.Module):
    """A convolution that a normalisation reads, and another layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        nn.init.constant_(self.norm.weight, 3.0)

    def forward(self, image):
        hidden = self.conv(image)
        return self.norm(hidden) + hidden


@pytest.mark.parametrize(
    ("model", "batches", "error", "match"),
    [
        (Residual(), [], bnnify.ArgumentError, "loader gives no batch"),
        (Residual(), [torch.zeros(2, 8)], RuntimeError, "Expected 3D"),
        (Residual(), [(images(), images(), images())], bnnify.ArgumentTypeError, "which of its elements are inputs"),
        (Residual().double(), [images().double()], bnnify.ArgumentError, r"float32 alone.*torch.float64.*float\(\)"),
        (Branching(), [torch.ones(2, 4)], bnnify.ExportError, "Branching cannot be exported: torch.export says"),
        (nn.LSTM(4, 4), [torch.ones(2, 3, 4)], bnnify.ArgumentError, "Nothing can be quantized.*no convolution"),
        (ReadTwice(), [images()], bnnify.ExportError, "before anything is rounded.*another layer reads"),
    ],
)
def test_what_cannot_be_quantized_is_refused(model, batches, error, match):
    with pytest.raises(error, match=match):
        bnnify.quantize(frozen(model), batches)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization.pt2e.quantize_pt2e", None)
    with pytest.raises(bnnify.MissingLibraryError, match=r"quantize needs torchao: pip install torchao"):
        bnnify.quantize(frozen(), [images()])


@torch.no_grad()
def test_a_published_network_is_as_good_in_int8_and_as_uncertain(data_folder):
    train, test = (
        data.cifar10(train=True, data=data_folder).take(slice(64)),
        data.cifar10(train=False, data=data_folder),
    )
    inputs = cifar_resnet.inputs(test.pixels[:300])
    model = cifar_resnet.pretrained(data_folder)
    ensemble = frozen(model, posterior_std=bnnify.ResponseStd([inputs[:100]], 0.15))
    quantized = bnnify.quantize(ensemble, [cifar_resnet.inputs(train.pixels)])
    found, expected = quantized(inputs), ensemble(inputs)
    nll = [
        torch.nn.functional.nll_loss(each.softmax(-1).mean(0).log(), test.labels[:300]) for each in (found, expected)
    ]
    assert abs(nll[0] - nll[1]) < 0.01
    assert correlation(mutual_information(found), mutual_information(expected)) > 0.95
