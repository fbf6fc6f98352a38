"""Programs without source: an exported program's parameters are selected by the operator that consumes them."""

import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import bnnify
from bnnify import ConversionError
from bnnify.modules.parameters import bayesian_parameters
from tests.contract import Case, broken, drawn_network

pytestmark = [
    pytest.mark.filterwarnings("ignore:The tensor attributes self.lstm._flat_weights"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Vision(nn.Module):
    """Convolutions of each kind, normalisation, a bare matrix, and a parameter that is only added."""

    def __init__(self):
        super().__init__()
        self.flat = nn.Conv1d(2, 4, 3, padding=1)
        self.image = nn.Conv2d(4, 3, 2, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.back = nn.ConvTranspose2d(3, 2, 2, groups=1)
        self.volume = nn.Conv3d(1, 2, 1)
        self.matrix = nn.Parameter(torch.randn(3, 2))
        self.offset = nn.Parameter(torch.randn(2, 1, 1))
        self.scale = nn.Parameter(torch.randn(2))

    def forward(self, x):
        x = torch.relu(self.flat(x)).unsqueeze(2).expand(-1, -1, 3, -1)
        x = self.back(self.norm(self.image(x))) + self.offset
        return {"out": self.volume(x.unsqueeze(1)).mean(2) @ x.new_ones(6, 3) @ self.matrix * self.scale}


class Language(nn.Module):
    """An embedding, of which one is tied to a head, attention, and a recurrent layer and cell."""

    def __init__(self):
        super().__init__()
        self.position = nn.Embedding(5, 4)
        self.embed = nn.Embedding(7, 4)
        self.block = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.cell = nn.GRUCell(4, 4)
        self.bilinear = nn.Bilinear(4, 4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.block(self.embed(tokens) + self.position.weight)
        x = self.lstm(x)[0]
        state = self.cell(x[:, 0], x[:, 1])
        return [self.head(x), self.bilinear(state, state)]


class Standardized(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


class Hypernetwork(nn.Module):
    """Multiplies with a weight that depends on the input."""

    def __init__(self):
        super().__init__()
        self.make = nn.Linear(3, 6)

    def forward(self, x):
        return torch.tanh(x) @ self.make(x).mean(0).view(3, 2)


class Queries(nn.Module):
    """Learned queries go through a layer of their own: what comes out is no weight."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(3, 4))
        self.key = nn.Linear(4, 4)

    def forward(self, x):
        return torch.softmax(x @ self.key(self.queries).mT, -1)


def partly_frozen():
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2).requires_grad_(False))


ATTENTION = {
    f"block.self_attn.{name}" for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
}
LANGUAGE = ATTENTION | {f"block.linear{i}.{name}" for i in (1, 2) for name in ("weight", "bias")}
LANGUAGE |= {f"lstm.{name}_l0" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
LANGUAGE |= {f"cell.{name}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
LANGUAGE |= {"bilinear.weight", "bilinear.bias", "embed.weight"}
# What makes the model and its input, and which parameters are weights.
MODELS = {
    "vision": (
        Vision,
        lambda: torch.randn(2, 2, 6),
        {f"{layer}.{name}" for layer in ("flat", "back", "volume") for name in ("weight", "bias")}
        | {"image.weight", "matrix"},
    ),
    "language": (Language, lambda: torch.randint(0, 7, (2, 5)), LANGUAGE),
    "language in eval": (lambda: Language().eval(), lambda: torch.randint(0, 7, (2, 5)), LANGUAGE),
    "a root": (lambda: nn.Linear(4, 3), lambda: torch.randn(5, 4), {"weight", "bias"}),
    "standardized": (
        lambda: nn.Sequential(Standardized(2, 3, 2)),
        lambda: torch.randn(2, 2, 4, 4),
        {"0.weight", "0.bias"},
    ),
    "hypernetwork": (Hypernetwork, lambda: torch.randn(5, 3), {"make.weight", "make.bias"}),
    "queries": (Queries, lambda: torch.randn(2, 5, 4), {"key.weight", "key.bias"}),
    "partly frozen": (partly_frozen, lambda: torch.randn(5, 4), {"0.weight", "0.bias"}),
}


def program(name, decomposed=False):
    torch.manual_seed(0)
    make, inputs, expected = MODELS[name]
    model, x = make(), inputs()
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,)), file)
    file.seek(0)
    exported = torch.export.load(file)
    return (exported.run_decompositions() if decomposed else exported).module(), (x,), expected


@pytest.fixture(scope="module")
def programs():
    """Each program once: exporting takes longer than the tests."""
    made = {}

    def get(name, decomposed=False):
        key = name, decomposed
        if key not in made:
            made[key] = program(name, decomposed)
        return made[key]

    return get


@pytest.mark.parametrize(("name", "decomposed"), [*((name, False) for name in MODELS), ("vision", True)])
def test_every_promise_is_kept_and_what_a_layer_consumes_is_bayesian(programs, name, decomposed):
    model, inputs, expected = programs(name, decomposed)
    # torch itself takes no gradient of a decomposed batch norm in train.
    allowed = {"draw in train", "gradients"} if decomposed else set()
    assert broken(Case(name, lambda: model, lambda model: (inputs, {}))).keys() <= allowed
    report = bnnify.convert(model, strict=True).report
    # The names of a tied parameter are in the order in which the graph reads them.
    assert {entry.name.replace("head", "embed") for entry in report.bayesian} == expected
    assert all(entry.reason for entry in report.left_alone)


def test_it_agrees_with_the_conversion_of_the_source():
    source = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(27, 4)).eval()
    x = torch.randn(2, 2, 4, 4)
    bnn, other = bnnify.convert(source), bnnify.convert(torch.export.export(source, (x,)).module())
    assert {e.name for e in bnn.report.bayesian} == {e.name for e in other.report.bayesian}
    assert {e.name for e in bnn.report.left_alone} == {e.name for e in other.report.left_alone}
    other.load_state_dict(bnn.state_dict())
    outputs = []
    for one in (bnn, other):
        torch.manual_seed(1)
        outputs.append(one(x))
    torch.testing.assert_close(*outputs)


def test_globs_and_functions_select_as_in_any_model(programs):
    model, _, _ = programs("vision")
    for select in ("back", lambda name, module: name == "back"):
        assert {e.name for e in bnnify.convert(model, select=select).report.bayesian} == {"back.weight", "back.bias"}
    assert [e.name for e in bnnify.convert(model, select="offset").report.bayesian] == ["offset"]
    report = bnnify.convert(model, select=["norm.weight", "flat"]).report
    assert {e.name for e in report.bayesian} == {"norm.weight", "flat.weight", "flat.bias"}


def test_a_program_inside_a_model_of_ones_own():
    x = torch.randn(5, 4)
    model = nn.Sequential(torch.export.export(nn.Linear(4, 3), (x,)).module(), nn.LayerNorm(3), nn.Linear(3, 2))
    bnn = bnnify.convert(model)
    assert [entry.name for entry in bnn.report.bayesian] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    with bnn.draw():
        plain = drawn_network(bnn)
        torch.testing.assert_close(bnn(x)[0], plain(x))


def test_predict_and_save_take_an_exported_program(programs, tmp_path):
    model, inputs, _ = programs("a root")
    bnn = bnnify.convert(model)
    assert bnn.predict(*inputs, num_samples=3).std.min() > 0
    bnnify.save(bnn, tmp_path / "model.bnn.pt")
    restored = bnnify.load(tmp_path / "model.bnn.pt", program("a root")[0])
    assert torch.equal(restored.module(*inputs), model(*inputs))


def test_torch_pickles_no_exported_program_and_none_that_is_converted(programs):
    model, _, _ = programs("a root")
    for one in (model, bnnify.convert(model)):
        with pytest.raises((AttributeError, pickle.PicklingError), match="local"):
            pickle.dumps(one)


def test_the_program_itself_is_refused_and_says_how_to_proceed():
    exported = torch.export.export(nn.Linear(4, 3), (torch.ones(1, 4),))
    with pytest.raises(ConversionError, match=r"ExportedProgram: it is not a torch.nn.Module. Pass its `.module\(\)`"):
        bnnify.convert(exported)
    assert len(bnnify.convert(exported.module()).report.bayesian) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("script", [torch.jit.script, lambda model: torch.jit.trace(model, torch.ones(1, 4))])
def test_torchscript_is_refused_and_says_how_to_proceed(script):
    with pytest.raises(ConversionError, match=r"ScriptModule.*the model it was made from.*torch.export.*`.module\(\)`"):
        bnnify.convert(script(nn.Linear(4, 3)))


class Traced(nn.Module):
    """Leaf modules, and a parameter that the graph reads itself."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.table = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return F.linear(torch.relu(self.fc(x)), self.table)


def test_traced_graphs_keep_their_layers():
    x, select = torch.randn(5, 4), {"select": ["fc", "table"]}
    assert not broken(Case("traced", lambda: fx.symbolic_trace(Traced()), lambda model: ((x,), {}), settings=select))


@pytest.mark.parametrize(("select", "count"), [(None, 2), (["fc", "table"], 3)])
def test_a_traced_graph_pickles(select, count):
    x, model = torch.randn(5, 4), Traced()
    graph = fx.symbolic_trace(model)
    bnn = bnnify.convert(graph, select=select)
    assert len(bnn.report.bayesian) == count
    for parameter in bayesian_parameters(bnn):
        parameter.rho.data.add_(0.1)
    other = pickle.loads(pickle.dumps(bnn))
    assert torch.equal(other.module(x), graph(x))
    assert not torch.equal(other(x)[0], other(x)[0])
    for ours, theirs in zip(bayesian_parameters(bnn), bayesian_parameters(other), strict=True):
        assert torch.equal(ours.rho, theirs.rho)
