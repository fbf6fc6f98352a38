"""The command, as a user meets it: exit status, one line on stderr, and the file it writes."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import bnnify
from bnnify.cli import main


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A checkpoint and a module in the working directory that makes its model."""
    (tmp_path / "my_models.py").write_text(
        "from torch import nn\n\ndef small():\n    return nn.Sequential(nn.Linear(4, 3), nn.ReLU())\n\nnumber = int\n"
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    torch.save({"state_dict": model.state_dict(), "epoch": 1}, tmp_path / "model.pt")
    monkeypatch.chdir(tmp_path)
    yield model
    sys.modules.pop("my_models", None)


def test_convert_writes_a_file_that_loads_as_the_converted_model(files, capsys):
    assert main(["convert", "model.pt", "--model", "my_models:small", "-o", "model.bnn.pt"]) == 0
    assert "2 of 2 parameters Bayesian" in capsys.readouterr().out
    bnn = bnnify.load("model.bnn.pt", nn.Sequential(nn.Linear(4, 3), nn.ReLU()))
    x = torch.randn(2, 4)
    assert torch.equal(bnn.module(x), files(x))
    assert torch.equal(bnn.module[0].weight_rho, bnnify.convert(files).module[0].weight_rho)


def test_the_installed_command_runs(files, tmp_path):
    command = [sys.executable, "-c", "import sys; from bnnify.cli import main; sys.exit(main())"]
    arguments = ["convert", "model.pt", "--model", "my_models:small", "-o", "out.pt"]
    finished = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert (tmp_path / "out.pt").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint": "absent.pt"}, "Cannot read `absent.pt`"),
        ({"--model": "absent:small"}, "No module named 'absent'"),
        ({"--model": "my_models:absent"}, "Cannot make a model with --model my_models:absent"),
        ({"--model": "my_models:number"}, "made a int, not a torch.nn.Module"),
        ({"--model": "torch.nn:Identity"}, "Nothing to convert"),
        ({"-o": "model.pt"}, "exists"),
        ({"-o": "absent/out.pt"}, "folder does not exist"),
    ],
)
def test_errors_are_one_line_and_leave_no_file(files, tmp_path, capsys, change, message):
    before = {path.name: path.stat().st_size for path in tmp_path.iterdir() if path.is_file()}
    options = {"checkpoint": "model.pt", "--model": "my_models:small", "-o": "out.pt"} | change
    status = main(["convert", options.pop("checkpoint"), *[word for pair in options.items() for word in pair]])
    error = capsys.readouterr().err
    assert status == 1
    assert message in error
    assert error.startswith("bnnify-cli: ")
    assert error.count("\n") == 1
    assert {path.name: path.stat().st_size for path in tmp_path.iterdir() if path.is_file()} == before


def test_force_writes_over_an_output_but_never_over_the_input(files, tmp_path):
    arguments = ["convert", "model.pt", "--model", "my_models:small", "--force", "-o"]
    (tmp_path / "out.pt").write_bytes(b"old")
    assert main([*arguments, "out.pt"]) == 0
    assert main([*arguments, "model.pt"]) == 1
    assert main(["convert", "absent.pt", "--model", "my_models:small", "--force", "-o", "out.pt"]) == 1


def test_debug_shows_the_traceback(files):
    with pytest.raises(bnnify.CheckpointError):
        main(["--debug", "convert", "absent.pt", "--model", "my_models:small", "-o", "out.pt"])


def test_a_wrong_command_line_exits_with_two(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["convert"])
