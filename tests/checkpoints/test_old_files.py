"""Files that earlier releases wrote load as they were written: the means, ρ, settings and KL of six small models."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import bnnify
from bnnify.modules.settings import is_bayesian

DATA = Path(__file__).parent / "data"


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


MODELS = {
    "mlp": mlp,  # pruned
    "conv": lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)),
    "tied": Tied,
    "lstm": lambda: nn.LSTM(2, 3),
    "mixture": mlp,
    "point": mlp,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ending", [".bnn.pt", ".safetensors"])
@pytest.mark.parametrize("written", ["format2", "format3"])
def test_files_of_earlier_releases_load_as_they_were_written(written, ending, name):
    if ending == ".safetensors":
        pytest.importorskip("safetensors")
    expected = json.loads((DATA / written / "expected.json").read_text())[name]
    bnn = bnnify.load(DATA / written / f"{name}{ending}", MODELS[name]())
    state = bnn.module.state_dict()
    total = sum(value.double().sum().item() for key, value in state.items() if "initial_std" not in key)
    assert total == pytest.approx(expected["sum"], abs=1e-9)
    torch.manual_seed(1)  # the KL to a mixture is by Monte Carlo
    assert bnn.kl().item() == pytest.approx(expected["kl"], rel=1e-6)
    layers = [
        f"{type(module).__name__}: {module.extra_repr()}" for module in bnn.module.modules() if is_bayesian(module)
    ]
    assert layers == expected["layers"]
