"""Decisions are written with the model and read again."""

import pytest
import torch
from torch import nn

import bnnify

DECISIONS = {
    "temperature": bnnify.Temperature(1.5),
    "sets": bnnify.ConformalSets(0.7, 0.9, "aps"),
    "intervals": bnnify.ConformalIntervals(1.7, 0.9, True),
    "abstain": bnnify.Abstention(0.8, 0.05, 0.95, 0.6),
}


@pytest.mark.parametrize("name", ["model.bnn.pt", "model.safetensors"])
def test_a_file_gives_back_the_decisions(name, tmp_path):
    bnn = bnnify.convert(nn.Linear(3, 2))
    assert bnn.decisions == {}
    bnn.decisions |= DECISIONS
    bnnify.save(bnn, tmp_path / name)
    assert bnnify.load(tmp_path / name, nn.Linear(3, 2)).decisions == DECISIONS


def test_one_that_no_file_could_restore_is_refused(tmp_path):
    bnn = bnnify.convert(nn.Linear(3, 2))
    bnn.decisions["mine"] = lambda prediction: prediction
    with pytest.raises(bnnify.CheckpointError, match=r"decisions\['mine'\].*Temperature"):
        bnnify.save(bnn, tmp_path / "model.bnn.pt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damage",
    [
        {"t": {"kind": "Temperature", "temperature": "hot"}},
        {"t": {"kind": "Temperature"}},
        {"t": {"kind": "Unknown"}},
        {"t": 3},
        {"sets": {"kind": "ConformalSets", "threshold": "0", "coverage": 0.9, "score": "lac"}},
        [3],
    ],
)
def test_damaged_ones_are_refused_and_older_files_have_none(damage, tmp_path):
    bnn, path = bnnify.convert(nn.Linear(3, 2)), tmp_path / "model.bnn.pt"
    bnnify.save(bnn, path)
    content = torch.load(path)
    content["bnnify"]["decisions"] = damage
    torch.save(content, path)
    with pytest.raises(bnnify.CheckpointError, match="is damaged"):
        bnnify.load(path, nn.Linear(3, 2))
    del content["bnnify"]["decisions"]
    torch.save(content, path)
    assert bnnify.load(path, nn.Linear(3, 2)).decisions == {}
