"""The regressions of Hernández-Lobato and Adams 2015, and many small networks that are trained side by side."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..harness.fetch import in_folder

NAMES = {
    "boston": "bostonHousing",
    "concrete": "concrete",
    "energy": "energy",
    "kin8nm": "kin8nm",
    "naval": "naval-propulsion-plant",
    "power": "power-plant",
    "protein": "protein-tertiary-structure",
    "wine": "wine-quality-red",
    "yacht": "yacht",
}


@dataclass(frozen=True)
class Regression:
    """A data set, and which of its rows are the test part of each split; the others are its training part."""

    name: str
    inputs: Tensor
    targets: Tensor
    tests: list[Tensor]
    hidden: int

    def train(self, split: int) -> Tensor:
        rest = torch.ones(len(self.targets), dtype=torch.bool)
        rest[self.tests[split]] = False
        return rest.nonzero()[:, 0]

    def validation(self, split: int) -> tuple[Tensor, Tensor]:
        """The rows of the training part, in random order: the first four fifths, and the last, for validation."""
        train = self.train(split)
        train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(split))]
        fifth = len(train) // 5
        return train[:-fifth], train[-fifth:]


@dataclass(frozen=True)
class Parts:
    """What S networks are trained on and judged by, each standardised by its own training part.

    Inputs have the shape (S, N, features), targets (S, N, 1); ``scale``, (S,), is the std of the training targets.
    """

    inputs: Tensor
    targets: Tensor
    held_inputs: Tensor
    held_targets: Tensor
    scale: Tensor

    @classmethod
    def of(cls, data: Regression, pairs: Sequence[tuple[Tensor, Tensor]]) -> Parts:
        """From the rows to train on and those to be judged by, of each network."""
        train, held = (torch.stack(rows) for rows in zip(*pairs, strict=True))
        tensors = []
        for values in (data.inputs, data.targets[:, None]):
            mean, std = values[train].mean(1, keepdim=True), values[train].std(1, keepdim=True)
            std[std == 0] = 1.0  # naval has two columns of one value
            tensors += [((values[rows] - mean) / std).float() for rows in (train, held)]
        return cls(tensors[0], tensors[2], tensors[1], tensors[3], std[:, 0, 0].float())

    def only(self, number: int) -> Parts:
        """Those of one network."""
        parts = (getattr(self, field.name)[number, None] for field in fields(self))
        return Parts(*parts)


def read(folder: Path, name: str) -> Regression:
    """A data set of `uci_regression.zip`."""
    with zipfile.ZipFile(in_folder(folder, "uci_regression.zip")) as archive:

        def numbers(file: str) -> np.ndarray:
            with archive.open(f"{NAMES[name]}/{file}.txt") as opened:
                return np.loadtxt(opened, ndmin=1)

        table = torch.tensor(numbers("data"))
        features, (target,) = (numbers(f"index_{part}").astype(int) for part in ("features", "target"))
        count, hidden = int(numbers("n_splits")[0]), int(numbers("n_hidden")[0])
        tests = [torch.tensor(numbers(f"index_test_{split}")).long() for split in range(count)]
    return Regression(name, table[:, features], table[:, target], tests, hidden)
