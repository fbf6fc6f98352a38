"""Converting what others wrote, and collapsing it again."""

import datetime
import os
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

import bnnify
from bnnify.cli.command import main

from .conftest import MADE, assert_same, there

NETWORKS = "benchmarks.harness.networks"


def test_convert_writes_a_file_that_loads_as_the_converted_model(model, capsys):
    assert main(["convert", "model.pt", *MADE]) == 0
    out, err = capsys.readouterr()
    assert "4 of 4 parameters Bayesian" in out
    assert err == "wrote model.bnn.pt\n"
    bnn = bnnify.load("model.bnn.pt", nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    x = torch.randn(2, 4)
    assert torch.equal(bnn.module(x), model(x))
    assert torch.equal(bnn.module[0].weight_rho, bnnify.convert(model).module[0].weight_rho)


def test_a_known_architecture_needs_no_model_argument(tmp_path, capsys):
    network = torchvision.models.squeezenet1_1(num_classes=7)
    torch.save({"model": {f"module.{k}": v for k, v in network.state_dict().items()}, "epoch": 3}, tmp_path / "net.pth")
    assert main(["convert", str(tmp_path / "net.pth")]) == 0
    assert "squeezenet1_1" in capsys.readouterr().out
    bnn = bnnify.load(tmp_path / "net.bnn.pt")
    assert type(bnnify.collapse(bnn)) is type(network)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(bnn.module.eval()(x), network.eval()(x))
    assert main(["collapse", str(tmp_path / "net.bnn.pt"), "-o", str(tmp_path / "back.pth")]) == 0
    back, original = (torch.load(tmp_path / name, weights_only=True) for name in ("back.pth", "net.pth"))
    assert back.keys() == original.keys()
    assert list(back["model"]) == list(original["model"])
    assert all(torch.equal(value, original["model"][key]) for key, value in back["model"].items())
    assert back["epoch"] == 3
    nn.DataParallel(torchvision.models.squeezenet1_1(num_classes=7)).load_state_dict(back["model"])


def test_a_hugging_face_directory_converts_loads_and_comes_back(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20, n_positions=16)
    network = transformers.GPT2LMHeadModel(config).eval()
    network.save_pretrained(tmp_path / "gpt2")
    assert main(["-q", "convert", str(tmp_path / "gpt2"), "-o", str(tmp_path / "gpt2.bnn.pt")]) == 0
    bnn = bnnify.load(tmp_path / "gpt2.bnn.pt")
    ids = torch.arange(6)[None]
    assert torch.equal(bnn.module.eval()(ids).logits, network(ids).logits)
    assert main(["-q", "collapse", str(tmp_path / "gpt2.bnn.pt"), "-o", str(tmp_path / "back.safetensors")]) == 0
    load_file = pytest.importorskip("safetensors.torch").load_file
    back, original = load_file(tmp_path / "back.safetensors"), load_file(tmp_path / "gpt2" / "model.safetensors")
    assert_same(back, original)


@pytest.mark.parametrize("trust", [[], ["--trust"]])
def test_what_stands_beside_the_weights_is_left_out_and_named(trust, model, capsys):
    content = torch.load("model.pt") | {"day": datetime.date(2026, 1, 1), "lr": 0.1}
    torch.save(content, "model.pt")
    assert main(["convert", "model.pt", *MADE, *trust]) == 0
    assert "note: left out, as it is no plain data: `day` (datetime.date)\n" in capsys.readouterr().out
    assert main(["collapse", "model.bnn.pt", "-o", "back.pt"]) == 0
    assert torch.load("back.pt").keys() == content.keys() - {"day"}


def test_a_module_of_ones_own_class_converts_by_the_model_without_trust(model, tmp_path, capsys):
    class Ours(nn.Sequential):
        pass

    Ours.__qualname__ = "Ours"
    globals()["Ours"] = Ours
    torch.save({"epoch": 3, "model": Ours(*model)}, "model.pt")
    del globals()["Ours"]
    assert main(["convert", "model.pt"]) == 1
    error = capsys.readouterr().err
    assert all(word in error for word in ("Ours`", "--model", "--trust"))
    assert main(["-q", "convert", "model.pt", *MADE]) == 0
    assert main(["-q", "collapse", "model.bnn.pt", "-o", "back.pt"]) == 0
    back = torch.load("back.pt")
    assert back["epoch"] == 3
    assert_same(back["model"], model.state_dict())


@pytest.mark.parametrize("ending", [".bnn.pt", ".bnn.safetensors"])
def test_the_settings_of_the_command_line_are_those_of_the_library(model, ending):
    pytest.importorskip("safetensors")
    settings = ["--prior", "Gaussian(std=0.5)", "--std", "2.*=Moped(0.1)", "--std", "0.03", "--estimator", "0=flipout"]
    settings += ["--posterior", "2.*=point", "--posterior", "mean-field"]
    assert main(["convert", "model.pt", *MADE, *settings, "--exclude", "2.bias", "-o", "out" + ending]) == 0
    found = bnnify.load("out" + ending, model)
    wanted = bnnify.convert(
        model,
        exclude="2.bias",
        prior=bnnify.Gaussian(std=0.5),
        posterior_std={"2.*": bnnify.Moped(0.1), "*": 0.03},
        posterior={"2.*": bnnify.Point()},
        estimator={"0": "flipout"},
    )
    reports = [str(bnn.report).replace("excluded", "not selected") for bnn in (found, wanted)]
    assert reports[0] == reports[1]
    assert_same(found.state_dict(), wanted.state_dict())
    assert torch.equal(found.kl(), wanted.kl())


def test_select_model_arguments_and_a_dry_run(model, tmp_path, capsys):
    torch.save(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).state_dict(), "wide.pt")
    before = there(tmp_path)
    options = [*MADE, "--model-args", '{"width": 5}', "--select", "0", "--dry-run"]
    assert main(["convert", "wide.pt", *options]) == 0
    assert "2 of 4 parameters Bayesian" in capsys.readouterr().out
    assert there(tmp_path) == before


def test_strict_refuses_what_is_not_supported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd_models.py").write_text(
        "from torch import nn\n\ndef odd():\n"
        "    model = nn.Sequential(nn.Linear(4, 4), nn.utils.parametrizations.orthogonal(nn.Linear(4, 4),"
        ' orthogonal_map="householder"))\n    return model\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import odd_models

    torch.save(odd_models.odd().state_dict(), "odd.pt")
    assert main(["convert", "odd.pt", "--model", "odd_models:odd", "--strict"]) == 1
    assert "strict=True" in capsys.readouterr().err
    assert not (tmp_path / "odd.bnn.pt").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint": "absent.pt"}, "absent.pt"),
        ({"checkpoint": "own.bnn.pt"}, "is Bayesian already. bnnify.load makes that model, `bnnify-cli inspect`"),
        ({"--model": "absent:small"}, "No module named 'absent'"),
        ({"--model": "absent"}, "--model absent does not say what makes a model. Give package.module:factory"),
        ({"--model": "my_models:stopping"}, "ValueError: No. Give package.module:factory"),
        ({"--model": "my_models:absent"}, "Cannot make a model with --model my_models:absent"),
        ({"--model": "my_models:number"}, "made a int, not a torch.nn.Module"),
        ({"--model": "torch.nn:Identity"}, "Identity"),
        ({"-o": "model.pt"}, "is the input"),
        ({"-o": "absent/out.pt"}, "folder does not exist"),
        ({"--select": "absent.*"}, "matches nothing"),
        ({"--exclude": "absent.*"}, "matches nothing"),
        ({"--exclude": "*"}, "Nothing to convert"),
    ],
)
def test_errors_are_one_line_and_leave_no_file(model, tmp_path, capsys, change, message):
    before = there(tmp_path)
    options = {"checkpoint": "model.pt", "--model": "my_models:small", "-o": "out.pt"} | change
    status = main(["convert", options.pop("checkpoint"), *[word for pair in options.items() for word in pair]])
    error = capsys.readouterr().err
    assert status == 1
    assert message in error
    assert error.startswith("bnnify-cli: ")
    assert error.count("\n") == 1
    assert ".." not in error
    assert there(tmp_path) == before


@pytest.mark.parametrize("command", ["inspect", "collapse", "prune"])
def test_what_bnnify_did_not_write_is_refused(model, tmp_path, capsys, command):
    for file in ["model.pt", "absent.pt", "my_models.py", "."]:
        before = there(tmp_path)
        assert main([command, file, *(["0.5"] if command == "prune" else [])]) == 1
        assert capsys.readouterr().err.count("\n") == 1
        assert there(tmp_path) == before


def test_a_model_that_diverged_is_refused_by_name(model, capsys):
    model[2].weight.data[1, 1] = float("nan")
    torch.save(model.state_dict(), "diverged.pt")
    assert main(["convert", "diverged.pt", *MADE]) == 1
    assert "NaN or infinite: 2.weight." in capsys.readouterr().err
    assert not Path("diverged.bnn.pt").exists()


def test_force_writes_over_an_output_but_never_over_the_input(model, tmp_path, capsys):
    (tmp_path / "out.pt").write_bytes(b"old")
    assert main(["convert", "model.pt", *MADE, "-o", "out.pt"]) == 1
    assert "exists" in capsys.readouterr().err
    assert main(["convert", "model.pt", *MADE, "-o", "out.pt", "--force"]) == 0
    os.link("model.pt", "same.pt")
    for name in ("model.pt", "same.pt"):
        assert main(["convert", "model.pt", *MADE, "-o", name, "--force"]) == 1
    assert main(["convert", "absent.pt", *MADE, "--force", "-o", "out.pt"]) == 1
    assert bnnify.load("out.pt", model)


REAL = {
    "resnet20-12fca82f.th": ["--model", f"{NETWORKS}.cifar_resnet:resnet20"],
    "khushbujpatel_lenet5_mnist.pt": None,
    "convadv_mnist.pth": ["--model", f"{NETWORKS}.small_networks:robust_cnn"],
    "cgcnn_band-gap.pth.tar": None,
    "lpips_squeeze.pth": None,
}


@pytest.mark.parametrize("name", REAL)
def test_real_files_convert_and_come_back_bit_for_bit_or_are_refused(name, data_folder, tmp_path, capsys):
    source = data_folder / "checkpoints" / name
    before = source.read_bytes()
    output, back = tmp_path / "out.bnn.pt", tmp_path / "back"
    status = main(["convert", str(source), *(REAL[name] or []), "-o", str(output)])
    if REAL[name] is None:
        assert status == 1
        error = capsys.readouterr().err
        assert "--model" in error
        assert error.count("\n") == 1
        assert not output.exists()
    else:
        assert status == 0
        assert main(["collapse", str(output), "-o", str(back)]) == 0
        found, original = (torch.load(path, map_location="cpu", weights_only=True) for path in (back, source))
        assert_same(found, original)
    assert source.read_bytes() == before
