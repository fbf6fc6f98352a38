"""The families of models over which the sweep goes: one file each, which lists its models without building them."""

__all__ = ["FAMILIES", "PRIOR", "cases"]

import dataclasses
import importlib

import bnnify
from tests.contract import Case

FAMILIES = ("torchvision", "timm", "transformers")

PRIOR = bnnify.Gaussian(mean=0.0, std=1.0)
"""Not the default, under which the KL of a fresh conversion is zero and every parameter is kept twice."""


def cases(family: str) -> dict[str, Case]:
    """The models of a family by name, none of them built; ``families/<family>_models.py`` has ``cases()``.

    Raises:
        ImportError: The library is not installed.
    """
    listed = importlib.import_module(f".{family}_models", __name__).cases()
    return {case.name: dataclasses.replace(case, settings={"prior": PRIOR, **case.settings}) for case in listed}
