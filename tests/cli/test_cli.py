"""The command, as a user meets it: exit status, one line on stderr, and the files it writes."""

import datetime
import json
import os
import signal
import subprocess
import sys
import textwrap
from importlib.resources import files as package_files
from pathlib import Path

import onnxruntime
import pytest
import torch
import torchvision
from torch import nn

import bnnify
from bnnify.cli.command import main

RUN = [sys.executable, "-c", "import sys; from bnnify.cli import main; sys.exit(main())"]
NETWORKS = "benchmarks.harness.networks"


@pytest.fixture
def model(tmp_path, monkeypatch):
    """The model of model.pt, with a module beside it in the working directory that makes it."""
    (tmp_path / "my_models.py").write_text(
        "from torch import nn\n\n"
        "def small(width=3):\n    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))\n\n"
        "number = int\n\n"
        "class Branching(nn.Sequential):\n"
        "    def forward(self, x):\n        return super().forward(x) if x.sum() > 0 else x[:, :2]\n\n"
        "def branching():\n    return Branching(*small())\n\n"
        "def stopping():\n    raise ValueError('No.')\n"
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    torch.save({"state_dict": model.state_dict(), "epoch": 1}, tmp_path / "model.pt")
    bnnify.save(bnnify.convert(model), tmp_path / "own.bnn.pt")
    monkeypatch.chdir(tmp_path)
    yield model
    sys.modules.pop("my_models", None)


MADE = ["--model", "my_models:small"]


def there(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


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


def test_python_runs_the_package_as_the_command(model):
    def run(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-m", "bnnify", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    assert run("--version").stdout.startswith("bnnify-cli ")
    assert run().returncode == 2
    assert run("convert", "missing.pt").returncode == 1
    done = run("convert", "model.pt", *MADE)
    assert (done.returncode, done.stderr) == (0, "wrote model.bnn.pt\n")


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


def test_inspect_prints_json_that_agrees_with_the_library(model, capsys):
    main(["-q", "convert", "model.pt", *MADE, "--prior", "Gaussian(std=0.1)"])
    assert capsys.readouterr() == ("", "")
    assert main(["inspect", "model.bnn.pt", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    bnn = bnnify.convert(model, prior=bnnify.Gaussian(std=0.1))
    assert found["kl"] == pytest.approx(bnn.kl().item(), rel=1e-5)
    assert [entry["name"] for entry in found["parameters"]] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    ratios = bnnify.signal_to_noise(bnn)
    for entry in found["parameters"]:
        assert tuple(entry["shape"]) == bnn.module.get_parameter(entry["name"]).shape
        low, *_, high = entry["signal_to_noise"]
        assert ratios[entry["name"]].min() <= low <= high <= ratios[entry["name"]].max()
        assert entry["std"] == sorted(entry["std"])


def test_inspect_draws_and_prints_a_table_without_colour_into_a_pipe(model, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    main(["-q", "convert", "model.pt", *MADE])
    assert main(["inspect", "model.bnn.pt", "--plot", "ratios.png"]) == 0
    out = capsys.readouterr().out
    assert "0.weight" in out
    assert "\x1b" not in out
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")


def test_prune_sets_weights_to_zero_for_good(model, capsys):
    main(["convert", "model.pt", *MADE])
    assert main(["prune", "model.bnn.pt", "0.5"]) == 0
    assert "of 23 Bayesian weights pruned" in capsys.readouterr().out
    bnn = bnnify.load("model.pruned.bnn.pt", model)
    expected = bnnify.convert(model)
    bnnify.prune(expected, 0.5)
    assert_same(bnn.state_dict(), expected.state_dict())
    assert main(["collapse", "model.pruned.bnn.pt"]) == 0
    plain = torch.load("model.pruned.collapsed.pt", weights_only=True)["state_dict"]
    assert sum(int((tensor == 0).sum()) for tensor in plain.values()) == 12


def test_export_writes_what_the_library_does_under_the_same_seed_and_says_what_it_compared(model, capsys):
    arguments = ["export", "own.bnn.pt", *MADE, "--input", "2,4", "-n", "3", "--likelihood", "logits", "--seed", "1"]
    assert main([*arguments, "-o", "out.onnx", "--outputs", "mean,std"]) == 0
    out, err = capsys.readouterr()
    assert "3 networks; inputs input (any size of dimension 0); outputs mean, std" in out
    assert "the largest difference is" in out
    assert err.endswith("wrote out.onnx\n")
    bnn, x = bnnify.load("own.bnn.pt", model), torch.randn(5, 4)
    torch.manual_seed(1)
    mean, _ = onnxruntime.InferenceSession("out.onnx").run(None, {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(mean), bnn.predict(x, 3, likelihood="logits").mean)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["-o", "out.h5"], "`out.h5` does not say which format to write"),
        (["--input", "2,9"], "shapes cannot be multiplied"),
        (["--input", "a=2,4"], "unexpected keyword argument 'a'"),
        (["--input", "a=2,4", "--input", "2,4"], "Give each --input a name"),
        (["--outputs", "median"], "Unknown output 'median'"),
        (["--likelihood", "odds"], "Unknown likelihood 'odds'"),
        (["--model", "my_models:branching"], "Could not guard on data-dependent expression"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_leaves_no_file(model, tmp_path, capsys, change, message):
    before = there(tmp_path)
    arguments = ["export", "own.bnn.pt", *MADE, "-o", "out.onnx", *([] if "--input" in change else ["--input", "2,4"])]
    assert main([*arguments, *change]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert there(tmp_path) == before


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


@pytest.mark.parametrize("before", [True, False])
def test_debug_shows_the_traceback(model, before):
    arguments = ["convert", "absent.pt", *MADE, "-o", "out.pt"]
    with pytest.raises(bnnify.CheckpointError):
        main(["--debug", *arguments] if before else [*arguments, "--debug"])


def test_a_wrong_command_line_exits_with_two(capsys):
    for arguments in [
        ["convert"],
        ["convert", "model.pt", "--std", "many"],
        ["convert", "model.pt", "--prior", "Gaussian(std=0)"],
        ["convert", "model.pt", "--prior", "__import__('os').system('true')"],
        ["convert", "model.pt", "--estimator", "best"],
        ["convert", "model.pt", "--posterior", "best"],
        ["convert", "model.pt", "--model-args", "[1]"],
        ["prune", "model.pt", "much"],
        ["export", "model.pt", "--input", "2,4"],
        ["export", "model.pt", "-o", "out.onnx", "--input", "2,four"],
        ["export", "model.pt", "-o", "out.onnx", "--input", "float:2,4", "--format", "tensorflow"],
        ["dance"],
        [],
    ]:
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert capsys.readouterr().out == ""


def test_a_sigma_that_is_a_number_but_none_that_can_be_is_refused_as_a_number(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["convert", "model.pt", "--std", "-1"])
    assert "must be a positive, finite number, not -1.0" in capsys.readouterr().err


def run(*arguments, code="", **options):
    """The command in a process of its own, after ``code``."""
    start = [sys.executable, "-c", f"{code}\nimport sys\nfrom bnnify.cli import main\nsys.exit(main())"]
    return subprocess.Popen([*start, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_a_reader_that_has_seen_enough_is_no_error(model):
    main(["-q", "convert", "model.pt", *MADE])
    code = "import sys; sys.stdout.reconfigure(write_through=True)"
    process = run("inspect", "model.bnn.pt", "--json", code=code)
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr.read() == ""


SLOW_WRITE = textwrap.dedent("""
    import signal, time, torch
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process in the background may not have
    def save(content, file, *args, **kwargs):
        file.write(b"half of it")
        file.flush()
        print("writing", flush=True)
        time.sleep(60)
    torch.save = save
""")


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_write_leaves_nothing_under_the_final_name(model, tmp_path, number):
    before = there(tmp_path)
    process = run("-q", "convert", "model.pt", *MADE, code=SLOW_WRITE)
    assert process.stdout.readline() == "writing\n"
    process.send_signal(number)
    assert process.wait(30) == (1 if number == signal.SIGINT else -signal.SIGKILL)
    left = there(tmp_path)
    assert "model.bnn.pt" not in left
    assert {name: left[name] for name in before} == before
    if number == signal.SIGINT:
        assert left == before
        assert process.stderr.read() == "bnnify-cli: interrupted; nothing was written\n"


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


def assert_same(found, original):
    assert type(found) is type(original)
    if isinstance(original, dict):
        assert list(found) == list(original)
        for key in original:
            assert_same(found[key], original[key])
    elif isinstance(original, torch.Tensor):
        assert torch.equal(found, original)
        assert found.dtype == original.dtype
    else:
        assert found == original


def test_the_demo_shows_what_fine_tuning_gains_within_80_columns(tmp_path, monkeypatch, capsys):
    pytest.importorskip("rich")
    pytest.importorskip("torchmetrics")
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("bnnify.cli.demo.SEEDS", 2)
    assert main(["demo", "--picture", str(tmp_path / "digits.png")]) == 0
    out, err = capsys.readouterr()
    rows = [line.split("│") for line in out.splitlines() if line.startswith("│")]
    assert [row[1].strip() for row in rows] == ["as trained", "trained longer", "converted", "fine-tuned"]
    nll = [float(row[3].partition("±")[0]) for row in rows]
    assert nll[3] < 0.9 * nll[2] < 0.9 * nll[0]
    assert nll[3] < 0.9 * nll[1]
    assert "…" not in out
    assert err == ""
    assert (tmp_path / "digits.png").stat().st_size > 1000


def test_what_the_demo_ships_is_small_and_says_where_it_comes_from():
    folder = package_files("bnnify") / "data"
    assert sum(path.stat().st_size for path in Path(str(folder)).iterdir()) < 200_000
    assert "CC BY 4.0" in (folder / "README.md").read_text()


def test_without_an_extra_the_demo_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["demo"]) == 1
    assert "pip install rich torchmetrics" in capsys.readouterr().err
