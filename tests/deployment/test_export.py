"""Exported files: they compute what predict does on the same networks, in their own runtime, or are not there."""

import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnnify
from bnnify.deployment.formats import aot_inductor, onnx, torch_export

K = 3
ENDINGS = {"onnx": "onnx", "torch.export": "pt2", "aot_inductor": "pt2", "executorch": "pte"}


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(), nn.Flatten())
    model.append(nn.Linear(144, 5))
    return bnnify.convert(model, posterior_std=0.1)


def images(rows=2):
    return torch.randn(rows, 3, 8, 8)


def run(path, form, *args, **kwargs):
    """What the file returns, by name."""
    if form == "onnx":
        session = onnxruntime.InferenceSession(path)
        names = [each.name for each in session.get_inputs()]
        given = dict(zip(names, args, strict=False)) | kwargs
        found = session.run(None, {name: value.numpy() for name, value in given.items()})
        return {each.name: torch.from_numpy(value) for each, value in zip(session.get_outputs(), found, strict=True)}
    if form == "torch.export":
        return torch.export.load(path).module()(*args, **kwargs)
    if form == "executorch":
        found = executorch_runtime().Runtime.get().load_program(path).load_method("forward").execute(list(args))
        return dict(zip(("mean", "predictive_entropy", "mutual_information"), found, strict=True))
    return torch._inductor.aoti_load_package(str(path))(*args, **kwargs)


def executorch_runtime():
    return pytest.importorskip("executorch.runtime", exc_type=ImportError)


def exported(bnn, path, example, **options):
    torch.manual_seed(1)
    return bnnify.export(bnn, path, example, **{"num_samples": K, **options})


def predicted(bnn, inputs, **options):
    torch.manual_seed(1)
    return bnn.predict(inputs, num_samples=K, **options)


@pytest.mark.parametrize("form", ENDINGS)
def test_a_file_computes_what_predict_does_under_the_same_seed(form, tmp_path):
    if form == "executorch":
        executorch_runtime()
    bnn, path = network(), tmp_path / f"model.{ENDINGS[form]}"
    before = [module.training for module in bnn.modules()]
    found = exported(bnn, path, images(), likelihood="logits", format=form)
    assert [module.training for module in bnn.modules()] == before
    assert (found.format, found.inputs) == (form, ("input",))
    assert found.dynamic == ({} if form == "executorch" else {"input": (0,)})
    assert found.outputs == ("mean", "predictive_entropy", "mutual_information")
    assert found.nbytes == path.stat().st_size
    assert found.max_difference < 1e-5
    assert found.num_inputs == 3
    x = images(5 if found.dynamic else 2)
    prediction = predicted(bnn, x, likelihood="logits")
    for name, value in run(path, form, x).items():
        torch.testing.assert_close(value, getattr(prediction, name), rtol=1e-4, atol=1e-5)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("likelihood", "names"),
    [
        ("values", ("mean", "epistemic_std")),
        ("binary_logits", ("mean", "predictive_entropy", "mutual_information")),
        ("gaussian", ("mean", "epistemic_std", "aleatoric_std", "total_std")),
    ],
)
def test_the_outputs_are_those_that_the_likelihood_tells(likelihood, names, tmp_path):
    bnn, x = bnnify.convert(nn.Linear(4, 6)), torch.randn(2, 4)
    output = (lambda out: (out[:, :3], out[:, 3:].exp())) if likelihood == "gaussian" else None
    found = exported(bnn, tmp_path / "model.pt2", x, likelihood=likelihood, output=output)
    assert found.outputs == names
    prediction = predicted(bnn, x, likelihood=likelihood, output=output)
    for name, value in run(tmp_path / "model.pt2", "torch.export", x).items():
        torch.testing.assert_close(value, getattr(prediction, name))


def test_outputs_can_be_chosen_by_name_and_are_all_there(tmp_path):
    bnn, x, path = network(), images(), tmp_path / "model.onnx"
    names = ("networks", "std", "epistemic_std", "mean")
    exported(bnn, path, x, likelihood="logits", outputs=names)
    found = run(path, "onnx", x)
    assert tuple(found) == names
    prediction = predicted(bnn, x, likelihood="logits")
    torch.testing.assert_close(found["networks"].softmax(-1).mean(0), prediction.mean)
    torch.testing.assert_close(found["std"], prediction.std)
    assert torch.equal(found["std"], found["epistemic_std"])


class Model(nn.Module):
    """Has named arguments and a nested output, in which a name is one that an operator gives its result."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, tokens, mask=None, scale=1.0):
        hidden = self.embed(tokens) * scale
        hidden = (hidden if mask is None else hidden * mask.unsqueeze(-1)).mean(1)
        return {"logits": self.head(hidden), "hidden": [hidden]}


@pytest.mark.parametrize("form", ["onnx", "torch.export"])
def test_inputs_and_outputs_have_the_names_of_the_model(form, tmp_path):
    bnn = bnnify.convert(Model(), select="head.*")
    example = {"tokens": torch.randint(0, 7, (2, 5)), "mask": torch.ones(2, 5), "scale": 2.0}
    path = tmp_path / f"model.{ENDINGS[form]}"
    found = exported(bnn, path, example, format=form)
    assert found.inputs == ("tokens", "mask")
    assert found.outputs == ("networks_logits", "networks_hidden_0")
    torch.manual_seed(1)
    with torch.no_grad():
        expected = bnnify.freeze(bnn, K)(**example)
    given = example if form == "torch.export" else {"tokens": example["tokens"], "mask": example["mask"]}
    values = run(path, form, **given)
    torch.testing.assert_close(values["networks_logits"], expected["logits"])
    torch.testing.assert_close(values["networks_hidden_0"], expected["hidden"][0])


def test_a_frozen_ensemble_is_exported_as_it_is(tmp_path):
    ensemble, x = bnnify.freeze(network(), 2), images()
    found = bnnify.export(ensemble, tmp_path / "model.pt2", x)
    assert (found.num_samples, found.outputs) == (2, ("networks",))
    with torch.no_grad():
        torch.testing.assert_close(
            run(tmp_path / "model.pt2", "torch.export", x)["networks"], ensemble.eval()(x), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(("select", "count"), [("fc.*", K), ("*", K)])
def test_a_file_holds_the_deterministic_weights_once_and_the_bayesian_ones_k_times(select, count, tmp_path):
    model = nn.Sequential()
    model.add_module("trunk", nn.Linear(256, 512))
    model.add_module("fc", nn.Linear(512, 128))
    bnn = bnnify.convert(model, select=select)
    drawn = sum(p.mean.numel() for p in bnnify.modules.bayesian_parameters(bnn.module))
    least = 4 * (sum(p.numel() for p in model.parameters()) + (count - 1) * drawn)
    for form in ("onnx", "torch.export"):
        found = exported(bnn, tmp_path / f"model.{ENDINGS[form]}", torch.randn(2, 256), format=form)
        assert least <= found.nbytes < 1.05 * least


WITHOUT_TORCH = """
import sys
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession("model.onnx")
found = session.run(["mean", "mutual_information"], {"input": np.load("x.npy")})
assert not [name for name in sys.modules if name.split(".")[0] in ("torch", "bnnify")]
np.savez("found.npz", mean=found[0], mutual_information=found[1])
"""


def test_onnx_runs_where_torch_is_not(tmp_path):
    bnn, x = network(), images(4)
    exported(bnn, tmp_path / "model.onnx", images(), likelihood="logits")
    np.save(tmp_path / "x.npy", x.numpy())
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH], cwd=tmp_path, check=True)
    found, prediction = np.load(tmp_path / "found.npz"), predicted(bnn, x, likelihood="logits")
    for name in found:
        np.testing.assert_allclose(found[name], getattr(prediction, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["onnx", "torch.export"])
def test_noise_as_an_input_makes_the_network_that_the_noise_says(form, tmp_path):
    bnn, x, path = bnnify.convert(nn.Linear(4, 3), posterior_std=0.5), torch.randn(6, 4), tmp_path / "model"
    bnnify.prune(bnn, 0.3)
    path = path.with_suffix(f".{ENDINGS[form]}")
    # As many examples as outputs, for which a noise of that size could be taken.
    found = bnnify.export(bnn, path, x[:3], noise="input", format=form)
    assert found.inputs == ("input", "weight_noise", "bias_noise")
    assert (found.num_samples, found.dynamic, found.outputs) == (1, {"input": (0,)}, ("networks",))
    noise = {"weight": torch.randn(3, 4), "bias": torch.randn(3)}
    given = {f"{name}_noise": e for name, e in noise.items()} if form == "onnx" else {"noise": noise}
    parameters = {p.name: p for p in bnnify.modules.bayesian_parameters(bnn.module)}
    weights = {name: p.kept_mean + F.softplus(p.rho) * noise[name] for name, p in parameters.items()}
    value = run(path, form, x, **given)["networks"]
    torch.testing.assert_close(value, F.linear(x, **weights)[None])


class DependsOnSize(nn.Linear):
    def forward(self, x):
        return super().forward(x if x.shape[0] % 2 else -x)


@pytest.mark.parametrize("noise", [None, "input"])
def test_where_the_code_depends_on_the_size_of_the_batch_that_is_fixed(noise, tmp_path):
    for layer, x in [(DependsOnSize(4, 3), torch.randn(2, 4)), (nn.LSTM(4, 3), torch.randn(5, 2, 4))]:
        bnn = bnnify.convert(nn.Sequential(layer), strict=False)
        assert bnnify.export(bnn, tmp_path / "model.pt2", x, noise=noise).dynamic == {}


def test_other_dimensions_can_be_chosen(tmp_path):
    bnn, tokens = bnnify.convert(Model()), torch.randint(0, 7, (2, 5))
    any_size = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    for noise in (None, "input"):
        path = tmp_path / f"{noise}.onnx"
        found = bnnify.export(bnn, path, tokens, dynamic_shapes={"tokens": any_size}, output="logits", noise=noise)
        assert found.dynamic == {"tokens": (0, 1)}
    assert run(tmp_path / "None.onnx", "onnx", torch.randint(0, 7, (3, 9)))["networks"].shape == (8, 3, 3)


def test_without_noise_it_cannot_be_an_input(tmp_path):
    without = bnnify.convert(nn.Linear(4, 3), posterior=bnnify.Point())
    for bnn, found in [(without, "no weight has noise"), (bnnify.freeze(without, 2), "Frozen networks have no noise")]:
        with pytest.raises(bnnify.ArgumentError, match=found):
            bnnify.export(bnn, tmp_path / "model.pt2", torch.randn(2, 4), noise="input")


class Padded(nn.Linear):
    """Attends to what a mask does not hide; of a row that is hidden as a whole it makes NaN."""

    def forward(self, x, mask):
        weights = x.sum(-1).masked_fill(mask == 0, -torch.inf).softmax(-1)
        return super().forward((weights.unsqueeze(-1) * x).sum(1)).log_softmax(-1)


def test_a_mask_stays_one_that_makes_sense(tmp_path):
    bnn, mask = bnnify.convert(Padded(4, 3), strict=False), torch.tensor([[1, 1, 0], [1, 0, 0]])
    found = bnnify.export(bnn, tmp_path / "model.pt2", (torch.randn(2, 3, 4), mask))
    assert (found.inputs, found.max_difference) == (("x", "mask"), 0.0)


class Branching(nn.Linear):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


class Random(nn.Linear):
    def forward(self, x):
        return super().forward(x) + torch.randn_like(x[:, :1])


class AlwaysDropping(nn.Linear):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, training=True)


class Unsupported(nn.Linear):
    def forward(self, x):
        return super().forward(x) + torch.special.bessel_j0(x[:, :1])


@pytest.mark.parametrize(
    ("layer", "options", "kind", "message"),
    [
        (Branching, {}, bnnify.ExportError, "Branching cannot be exported: torch.export says: .*decisions"),
        (Random, {}, bnnify.ExportError, "Random draws random numbers .*rand"),
        (AlwaysDropping, {}, bnnify.ExportError, "AlwaysDropping draws random numbers .*dropout"),
        (Unsupported, {}, bnnify.ExportError, "format .onnx. cannot hold or run this model.*bessel_j0"),
        (nn.Linear, {"path": "model.h5"}, bnnify.ArgumentError, "does not say which format.*onnx, .pt2"),
        (nn.Linear, {"format": "torch.export"}, bnnify.ArgumentError, "must end in .pt2"),
        (nn.Linear, {"format": "tensorflow"}, bnnify.ArgumentError, "known are onnx, torch.export"),
        (nn.Linear, {"path": "absent/model.onnx"}, bnnify.CheckpointError, "Cannot write"),
        (nn.Linear, {"outputs": ["median"]}, bnnify.ArgumentError, "Unknown output 'median': known are networks, mean"),
        (nn.Linear, {"outputs": ["predictive_entropy"]}, bnnify.ArgumentError, "'values' tells no predictive_entropy"),
        (nn.Linear, {"noise": "seed"}, bnnify.ArgumentError, "noise"),
        (nn.Linear, {"num_samples": 0}, bnnify.ArgumentError, "num_samples"),
        (nn.Linear, {"example": torch.ones(2, 4, device="meta")}, bnnify.ArgumentError, "are on meta.* is on cpu"),
        (nn.Linear, {"example": torch.ones(2, 9)}, RuntimeError, "shapes"),
        (nn.Linear, {"example": (torch.ones(2, 4), 3)}, bnnify.ArgumentTypeError, "called with"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_a_line_and_leaves_no_file(layer, options, kind, message, tmp_path):
    options = {"path": "model.onnx", "example": torch.ones(2, 4), **options}
    bnn, path = bnnify.convert(nn.Sequential(layer(4, 3))[0], strict=False), tmp_path / options.pop("path")
    with pytest.raises(kind, match=message) as caught:
        exported(bnn, path, options.pop("example"), **options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        ("wrong", bnnify.ExportError, "`networks` otherwise than the networks: by 0.01, where rounding explains"),
        ("full", bnnify.CheckpointError, "No space left on device"),
    ],
)
def test_a_file_that_is_wrong_or_not_whole_is_not_left(failure, kind, message, existing, tmp_path, monkeypatch):
    path = tmp_path / "model.pt2"
    if existing:
        path.write_bytes(b"before")
    load = torch_export.TorchExport.load

    def write(self, program, path, inputs, outputs):
        raise OSError(28, "No space left on device")

    def load_wrong(self, path, outputs):
        return lambda arguments: {name: value + 0.01 for name, value in load(self, path, outputs)(arguments).items()}

    if failure == "full":
        monkeypatch.setattr(torch_export.TorchExport, "write", write)
    else:
        monkeypatch.setattr(torch_export.TorchExport, "load", load_wrong)
    with pytest.raises(kind, match=message):
        exported(bnnify.convert(nn.Linear(4, 3)), path, torch.randn(2, 4))
    assert [each.read_bytes() for each in tmp_path.iterdir()] == ([b"before"] if existing else [])


def test_a_missing_library_or_compiler_is_named(tmp_path, monkeypatch):
    bnn = bnnify.convert(nn.Linear(4, 3))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(bnnify.MissingLibraryError, match=r"onnxruntime.*pip install onnx onnxruntime onnxscript"):
        bnnify.export(bnn, tmp_path / "model.onnx", torch.randn(2, 4))
    monkeypatch.setitem(sys.modules, "executorch.exir", None)
    with pytest.raises(bnnify.MissingLibraryError, match="pip install executorch"):
        bnnify.export(bnn, tmp_path / "model.pte", torch.randn(2, 4))
    monkeypatch.setattr(aot_inductor.shutil, "which", lambda name: None)
    with pytest.raises(bnnify.MissingLibraryError, match=r"C\+\+ compiler.*CXX"):
        bnnify.export(bnn, tmp_path / "model.pt2", torch.randn(2, 4), format="aot_inductor")


def test_an_onnx_file_above_the_limit_is_refused_before_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "_LIMIT", 100)
    with pytest.raises(bnnify.ArgumentError, match=r"at most 2 GiB.*write a .pt2 file"):
        bnnify.export(bnnify.convert(nn.Linear(4, 30)), tmp_path / "model.onnx", torch.randn(2, 4))
    assert not list(tmp_path.iterdir())


class Bag(nn.Module):
    """Takes where the bags begin: the first at 0, which only some other values do."""

    def __init__(self):
        super().__init__()
        self.bag, self.fc = nn.EmbeddingBag(9, 4), nn.Linear(4, 3)

    def forward(self, words, begins):
        return self.fc(self.bag(words, begins))


def test_it_tells_on_how_many_inputs_a_file_was_compared(tmp_path):
    example = torch.tensor([1, 5, 2, 8, 3, 4]), torch.tensor([0, 2, 5])
    found = exported(bnnify.convert(Bag()), tmp_path / "model.pt2", example, dynamic_shapes=None)
    assert found.num_inputs == 2
    assert "compared on 2 inputs:" in str(found)


def test_a_graph_is_exported_as_it_is_and_has_its_output_already(tmp_path):
    graph, x = bnnify.freeze(network(), 2).as_graph(images()), images()
    found = bnnify.export(graph, tmp_path / "model.onnx", x, likelihood="logits")
    assert (found.num_samples, found.dynamic) == (2, {"input": (0,)})
    with torch.no_grad():
        mean = graph(x).softmax(-1).mean(0)
    torch.testing.assert_close(run(tmp_path / "model.onnx", "onnx", x)["mean"], mean, rtol=1e-4, atol=1e-5)
    for options in ({"output": 0}, {"noise": "input"}):
        with pytest.raises(bnnify.ArgumentError, match=r"was chosen when it was made|have no noise"):
            bnnify.export(graph, tmp_path / "other.onnx", x, **options)


@pytest.mark.parametrize("form", ["onnx", "torch.export"])
def test_a_file_holds_neither_the_example_nor_paths_of_the_machine(form, tmp_path):
    bnn, x = network(), torch.full((2, 3, 8, 8), 0.1234567)
    path = tmp_path / f"model.{ENDINGS[form]}"
    exported(bnn, path, x, format=form)
    content = path.read_bytes()
    assert x[0, 0].numpy().tobytes() not in content
    assert b"site-packages" not in content
    assert b"bnnify/deployment" not in content
