"""What the command tells of a file, and what it prunes."""

import json

import pytest
import torch

import bnnify
from bnnify.cli.command import main

from .conftest import MADE, assert_same


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
