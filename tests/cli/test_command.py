"""What all commands have in common: JSON, help, one line of error, the history, and completion."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bnnify
from bnnify.cli.command import main
from bnnify.cli.commands import COMMANDS
from bnnify.cli.screen import Screen, about

from .conftest import of


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_fits_eighty_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    out = capsys.readouterr().out
    assert f"bnnify-cli {command}" in out.partition("example")[2]
    assert [line for line in out.splitlines() if len(line) > 80] == []
    assert not re.search("Σ", out)


def test_json_is_one_object_and_nothing_else_on_standard_output(folder, run, capsys):
    torch.save(_classifier().state_dict(), "weights.pt")
    model, data = of("classifier"), ["--data", "classes.csv", "-n", 2]
    commands = [
        ["convert", "weights.pt", *model],
        ["inspect", "weights.bnn.pt"],
        ["tune", "weights.bnn.pt", *model, *data],
        ["predict", "weights.tuned.bnn.pt", *model, *data],
        ["evaluate", "weights.tuned.bnn.pt", *model, *data, "--bootstrap", 0],
        ["finetune", "weights.bnn.pt", *model, *data, "--epochs", 1],
        ["prune", "weights.bnn.pt", 0.5],
        ["export", "weights.bnn.pt", *model, "-o", "out.pt2", "--input", "2,4", "-n", 1],
        ["collapse", "weights.bnn.pt"],
        ["completion", "bash"],
    ]
    assert {command[0] for command in commands} | {"demo"} == set(COMMANDS)
    for command in commands:
        found = run(*command)
        assert isinstance(found, dict)
        assert found
        if found.get("output"):
            assert Path(found["output"]).is_file()


def _classifier():
    import cli_models

    return cli_models.classifier()


def test_json_holds_no_number_that_other_readers_refuse(capsys):
    Screen(json=True).result({"a": float("nan"), "b": [float("inf"), 1.5], "c": Path("x"), "d": (True, None)})
    found = capsys.readouterr().out
    assert json.loads(found, parse_constant=pytest.fail) == {"a": None, "b": [None, 1.5], "c": "x", "d": [True, None]}


def test_the_history_tells_what_was_done_and_the_next_command_need_not_be_told(folder, run, capsys):
    run("tune", "classifier.bnn.pt", *of("classifier"), "--data", "classes.csv", "--target", "y", "-n", 2)
    run("prune", "classifier.tuned.bnn.pt", 0.1, "-o", "pruned.bnn.pt")
    tuned, pruned = run("inspect", "pruned.bnn.pt")["history"]
    assert (tuned["what"], pruned["what"]) == ("tune", "prune")
    assert tuned["settings"]["data"] == "classes.csv"
    assert tuned["figures"]["num_data"] == 60
    assert pruned["settings"] == {"fraction": 0.1, "per_layer": False}
    assert main(["inspect", "pruned.bnn.pt"]) == 0
    told = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split()[2] for line in told] == ["tune", "prune"]
    # Neither the likelihood nor the column of the target.
    rows = run("predict", "pruned.bnn.pt", *of("classifier"), "--data", "classes.csv", "-n", 2)["predictions"]
    assert rows[0].keys() >= {"class", "probability"}
    back = bnnify.load("pruned.bnn.pt", _classifier())
    bnnify.save(bnnify.convert(back), "again.bnn.safetensors")
    assert run("inspect", "again.bnn.safetensors")["history"] == [tuned, pruned]


def test_what_changes_the_posterior_takes_the_rules_for_decisions_away(folder, run):
    model, data = of("classifier"), ["--data", "classes.csv", "-n", 2, "--force"]
    tuned = run("tune", "classifier.bnn.pt", *model, *data, "--calibrate", "classes.csv", "-o", "ruled.bnn.pt")
    assert set(tuned["decisions"]) >= {"temperature", "conformal_sets"}
    row = run("predict", "ruled.bnn.pt", *model, *data)["predictions"][0]
    assert row.keys() >= {"set", "mutual_information"}
    run("tune", "ruled.bnn.pt", *model, *data, "-o", "tuned.bnn.pt")
    run("finetune", "ruled.bnn.pt", *model, *data, "--epochs", 1, "-o", "trained.bnn.pt")
    run("prune", "ruled.bnn.pt", 0.1, "-o", "pruned.bnn.pt")
    for name in ("tuned", "trained", "pruned"):
        assert bnnify.load(f"{name}.bnn.pt", _classifier()).decisions == {}


def test_files_of_earlier_releases_have_no_history(folder, run):
    content = torch.load("classifier.bnn.pt", weights_only=True)
    del content["bnnify"]["history"]
    torch.save(content, "old.bnn.pt")
    assert run("inspect", "old.bnn.pt")["history"] == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "weights.pt", *of("classifier")],
        ["prune", "classifier.bnn.pt", "0.5"],
        ["collapse", "classifier.bnn.pt"],
        ["tune", "classifier.bnn.pt", *of("classifier"), "--data", "classes.csv"],
        ["finetune", "classifier.bnn.pt", *of("classifier"), "--data", "classes.csv"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_the_ending_of_another_format_is_refused_by_name_and_so_is_a_missing_folder(folder, refused, arguments):
    before = set(folder.iterdir())
    assert "not in .onnx. `bnnify.export` and `bnnify-cli export` write" in refused(*arguments, "-o", "out.onnx")
    assert "ends in .pt or .safetensors, not in .h5" in refused(*arguments, "-o", "out.h5")
    assert "its folder does not exist" in refused(*arguments, "-o", "absent/out.pt")
    assert set(folder.iterdir()) - before <= {folder / "__pycache__"}


@pytest.mark.parametrize(
    "arguments", [["inspect", "classifier.bnn.pt", "--plot"], ["demo", "--picture"]], ids=lambda each: each[0]
)
def test_a_picture_in_a_missing_folder_fails_before_the_work(folder, refused, arguments, monkeypatch):
    monkeypatch.setattr("bnnify.cli.commands.inspect.open_posterior", pytest.fail)
    monkeypatch.setattr("bnnify.cli.demo.load_digits", pytest.fail)
    assert "its folder does not exist" in refused(*arguments, "absent/picture.png")


def test_the_ending_decides_in_which_format_collapse_writes(folder, run):
    safetensors = pytest.importorskip("safetensors.torch")
    torch.save({"state_dict": _classifier().state_dict(), "epoch": 3}, "weights.pt")
    run("convert", "weights.pt", *of("classifier"))
    run("collapse", "weights.bnn.pt", "-o", "back.safetensors")
    wanted = torch.load("weights.pt", weights_only=True)["state_dict"]
    found = safetensors.load_file("back.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    run("convert", "back.safetensors", *of("classifier"))
    run("collapse", "back.bnn.pt", "-o", "again.pt")
    again = torch.load("again.pt", weights_only=True)
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)


def test_inspect_cuts_no_name_in_a_pipe_and_in_eighty_columns(tmp_path, capsys, monkeypatch):
    names = [f"encoder.blocks.{number}.attention.output_projection_of_the_block" for number in range(12)]
    model = torch.nn.ModuleDict()
    for number, name in enumerate(names):
        _put(model, name, torch.nn.Linear(1000 + number, 10))
    bnnify.save(bnnify.convert(model), tmp_path / "long.bnn.pt")
    assert main(["inspect", str(tmp_path / "long.bnn.pt")]) == 0
    out = capsys.readouterr().out
    assert all(f"{name}.weight" in out for name in names)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["inspect", str(tmp_path / "long.bnn.pt")]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) > 60
    assert "…" not in out


def _put(root, name, module):
    *path, last = name.split(".")
    for part in path:
        if part not in root:
            root[part] = torch.nn.ModuleDict()
        root = root[part]
    root[last] = module


def test_a_wrong_model_and_a_file_that_is_converted_already_are_short_errors(photos, refused):
    wrong = refused("predict", "net.bnn.pt", "--data", "test", "--model", "torchvision.models:densenet121")
    assert len(wrong) < 600
    assert "is Bayesian already" in refused("convert", "net.bnn.pt")


def test_a_prior_takes_keywords_alone(folder, capsys):
    with pytest.raises(TypeError):
        bnnify.Gaussian(0.1)
    with pytest.raises(SystemExit, match="2"):
        main(["convert", "weights.pt", "--prior", "Gaussian(0.1)"])
    assert "name what you set, as in Gaussian(std=0.1)" in capsys.readouterr().err


def test_a_shell_completes_by_the_script(tmp_path):
    pytest.importorskip("shtab")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "bnnify", "completion", "bash"]
    script = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "--calibrate" in script
    (tmp_path / "completion.sh").write_text(script)
    subprocess.run(["bash", "-n", str(tmp_path / "completion.sh")], check=True)


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "1 s"), (50, "50 s"), (200, "3 min"), (7300, "2 h")])
def test_durations_are_told_to_a_digit_or_two(seconds, text):
    assert about(seconds) == text
