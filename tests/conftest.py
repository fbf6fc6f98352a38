"""One thread per test process: pytest-xdist runs as many processes as there are cores."""

import os
from pathlib import Path

import pytest
import torch

from .processes import in_processes as in_processes

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder with real data and checkpoints, which the repository does not contain."""
    folder = os.environ.get("BNNIFY_DATA")
    if not folder:
        pytest.skip("needs real data: set BNNIFY_DATA to the folder that holds it")
    return Path(folder)
