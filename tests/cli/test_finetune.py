"""Fine-tuning with the command: resuming, early stopping, logs, the noise of a regression, and several processes."""

import ast
import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bnnify
from bnnify.cli.command import main
from bnnify.cli.finetuning.loop import FineTuning

from .conftest import of


def finetune(model, data, *more, output="out.bnn.pt"):
    options = ["--data", data, "--epochs", 4, "--batch-size", 8, "-n", 2, "--patience", 9, "-o", output]
    return ["finetune", f"{model}.bnn.pt", *of(model), *options, *more]


def weights(path, name):
    import cli_models

    return bnnify.load(path, getattr(cli_models, name)()).state_dict()


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_an_interrupted_training_goes_on_bit_for_bit(folder, run, monkeypatch, capsys):
    run(*finetune("normalised", "classes.csv", "--lr", 0.01))
    step = FineTuning.step

    def interrupted(self, advance):
        if self.epoch == 2:
            raise KeyboardInterrupt
        return step(self, advance)

    with monkeypatch.context() as patch:
        patch.setattr(FineTuning, "step", interrupted)
        arguments = list(map(str, finetune("normalised", "classes.csv", "--lr", 0.01, output="again.bnn.pt")))
        assert main(arguments) == 1
    assert "with --resume begins it anew" in capsys.readouterr().err
    assert not Path("again.bnn.pt").exists()
    run(*finetune("normalised", "classes.csv", "--lr", 0.01, "--resume", output="again.bnn.pt"))
    assert_same(weights("again.bnn.pt", "normalised"), weights("out.bnn.pt", "normalised"))
    logs = [list(csv.DictReader(Path(f"{name}.logs/metrics.csv").open())) for name in ("out", "again")]
    assert [row["epoch"] for row in logs[1]] == ["0", "1", "2", "3", "4"]
    assert [row["held_out_nll"] for row in logs[0]] == [row["held_out_nll"] for row in logs[1]]
    assert not Path("again.bnn.pt.checkpoint").exists()


def test_what_cannot_be_resumed_is_refused(folder, run, refused, monkeypatch):
    arguments = finetune("classifier", "classes.csv")
    assert "There is no `out.bnn.pt.checkpoint`" in refused(*arguments, "--resume")
    with monkeypatch.context() as patch:
        patch.setattr(FineTuning, "take_best", lambda self: 1 / 0)
        assert "ZeroDivisionError" in refused(*arguments)
    assert "Go on from it with --resume, or pass --force" in refused(*arguments)
    assert "other settings (lr 0.0001 → 0.5)" in refused(*arguments, "--resume", "--lr", 0.5)
    Path("out.bnn.pt.checkpoint").write_bytes(b"half")
    assert "is damaged" in refused(*arguments, "--resume")
    assert run(*arguments, "--force")["epochs"] == 4


def test_training_follows_the_elbo_of_the_global_data(folder, run):
    found = run(*finetune("classifier", "classes.csv", "--lr", 0.02, "--hold-out", 0.2))
    assert found["num_data"] == 48
    assert run(*finetune("classifier", "classes.csv", "--num-data", 1000, output="b.bnn.pt"))["num_data"] == 1000
    rows = list(csv.DictReader(Path("out.logs/metrics.csv").open()))
    assert float(rows[-1]["train_nll"]) < float(rows[1]["train_nll"])
    assert any(path.name.startswith("events.out.tfevents") for path in Path("out.logs").iterdir())


def test_the_best_epoch_is_kept_and_no_gain_stops_early(folder, run):
    arguments = finetune("classifier", "classes.csv", "--lr", 30.0, "--patience", 2)  # far too large
    found = run(*arguments)
    assert found["best_epoch"] == 0
    assert found["epochs"] == 2
    before = weights("classifier.bnn.pt", "classifier")
    assert_same(weights("out.bnn.pt", "classifier"), before)


def test_a_regression_learns_its_noise_and_later_commands_know_it(folder, run):
    learning = ["--lr", 0.05, "--rho-lr", 0.05, "--beta", 0.01, "--epochs", 60, "--patience", 60]
    run(*finetune("regressor", "amounts.csv", *learning, "--validation", "amounts.csv"))
    noise = run("inspect", "out.bnn.pt")["history"][-1]["settings"]["noise"]
    assert 0.2 < noise < 0.8  # 0.5 made the data
    rows = run("predict", "out.bnn.pt", *of("regressor"), "--data", "amounts.csv", "-n", 3)["predictions"]
    for row in rows:
        assert row["total_std"] == pytest.approx((row["epistemic_std"] ** 2 + noise**2) ** 0.5, rel=1e-4)
        assert row["low"] < row["mean"] < row["high"]
    report = run("evaluate", "out.bnn.pt", *of("regressor"), "--data", "amounts.csv", "--bootstrap", 0)
    assert "crps" in str(report).lower()


def test_without_known_noise_a_regression_has_no_interval(folder, run, refused):
    row = run("predict", "regressor.bnn.pt", *of("regressor"), "--data", "amounts.csv", "-n", 2)["predictions"][0]
    assert row.keys() == {"input", "mean", "epistemic_std"}
    assert "--noise" in refused("evaluate", "regressor.bnn.pt", *of("regressor"), "--data", "amounts.csv")
    row = run("predict", "regressor.bnn.pt", *of("regressor"), "--data", "amounts.csv", "-n", 2, "--noise", 0.5)
    assert row["predictions"][0]["total_std"] >= 0.5


WATCHED = """
import os
import sys
from torch import nn
from bnnify.cli import main

forward, seen = nn.Linear.forward, []

def watched(self, x):
    if self.training:
        seen.append((len(x), self.weight.detach().double().sum().item()))
    return forward(self, x)

nn.Linear.forward = watched
status = main()
with open("seen" + os.environ["RANK"], "w") as file:
    file.write(repr(seen))
sys.exit(status)
"""


def test_two_processes_share_the_data_draw_other_networks_and_the_first_one_writes(folder):
    Path("watched.py").write_text(WATCHED)
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parents[2]}{os.pathsep}{folder}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "watched.py"]
    arguments = finetune("regressor", "amounts.csv", "--lr", 0.01, "--epochs", 1, "--device", "cpu", "--json")
    done = subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"num_data": 54') == 1
    assert done.stderr.count("wrote out.bnn.pt") == 1
    assert not Path("out.bnn.pt.checkpoint").exists()
    first, second = (ast.literal_eval(Path(f"seen{rank}").read_text()) for rank in (0, 1))
    assert sum(rows for rows, _ in first[::2]) == sum(rows for rows, _ in second[::2]) == 27
    assert not {drawn for _, drawn in first} & {drawn for _, drawn in second}
    assert weights("out.bnn.pt", "regressor")
