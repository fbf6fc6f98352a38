"""Small networks and generated data for the command."""

import json
import sys

import numpy as np
import pandas
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

import bnnify
from bnnify.cli.command import main

MODELS = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def classifier():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

def regressor():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))

def normalised():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.ReLU(), nn.Linear(8, 3))

def loader():
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(30, 4), torch.randint(0, 3, (30,))), 10)

number = int
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with models in it and their converted files, and tables of numbers to classify."""
    (tmp_path / "cli_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.manual_seed(0)
    x = torch.randn(60, 4)
    weights = torch.randn(4, 3)
    classes = (x @ weights + torch.randn(60, 3)).argmax(1)
    amounts = x @ weights[:, :1] + 0.5 * torch.randn(60, 1)
    frame = pandas.DataFrame(x.numpy(), columns=[*"abcd"])
    frame.assign(y=classes.numpy()).to_csv("classes.csv", index=False)
    frame.assign(y=amounts.numpy()).to_csv("amounts.csv", index=False)
    np.savez("classes.npz", x=x.numpy(), y=classes.numpy())
    import cli_models

    for name in ("classifier", "regressor", "normalised"):
        bnnify.save(bnnify.convert(getattr(cli_models, name)()), f"{name}.bnn.pt")
    yield tmp_path
    sys.modules.pop("cli_models", None)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """The working directory, with three folders of reddish and bluish images and a converted squeezenet."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for split in ("train", "held_out", "test"):
        for channel, name in ((2, "blue"), (0, "red")):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(6):
                pixels = random.integers(0, 256, (50, 60, 3))
                pixels[..., channel] = pixels[..., channel] // 2 + 127
                Image.fromarray(pixels.astype("uint8")).save(tmp_path / split / name / f"{number}.png")
    torch.manual_seed(0)
    network = torchvision.models.squeezenet1_1(num_classes=2)
    torch.save(network.state_dict(), "net.pt")
    assert main(["-q", "convert", "net.pt"]) == 0
    return tmp_path


@pytest.fixture
def run(capsys):
    """Run the command, and return what it printed on standard output as JSON."""

    def run(*arguments):
        status = main([*map(str, arguments), "--json"])
        out, err = capsys.readouterr()
        assert status == 0, err
        return json.loads(out)

    return run


@pytest.fixture
def refused(capsys):
    """Run the command, which must fail, and return the one line that it says."""

    def refused(*arguments):
        assert main(list(map(str, arguments))) == 1
        err = capsys.readouterr().err
        lines = err.splitlines()
        assert lines[-1].startswith("bnnify-cli: ")
        assert sum(line.startswith("bnnify-cli: ") for line in lines) == 1
        return lines[-1]

    return refused


def of(name):
    """What says how to make the model ``name``."""
    return ["--model", f"cli_models:{name}"]


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
