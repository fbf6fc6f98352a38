"""Class numbers, of the names or numbers that stand in a file or name a folder."""

__all__ = ["class_numbers"]

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import ArgumentError


def class_numbers(where: str, labels: Sequence[Any], known: Sequence[str]) -> tuple[Tensor, tuple[str, ...]]:
    """Return the number of the class of each label, and the names of the classes.

    Labels that are whole numbers are class numbers; others are looked up in ``known``, the names in the order of the
    network's outputs, or numbered in the order of the alphabet if there are none.

    Raises:
        ArgumentError: A label is none of the known ones, or a negative number.
    """
    if all(isinstance(label, int) for label in labels):
        numbers = torch.tensor(labels)
        if len(labels) and numbers.min() < 0:
            raise ArgumentError(
                f"`{where}` has the class number {int(numbers.min())}; they count from 0. Of a regression say "
                "--likelihood values."
            )
        return numbers, tuple(known)
    names = tuple(known) or tuple(sorted(set(map(str, labels))))
    by_name = {name: number for number, name in enumerate(names)}
    for label in labels:
        if str(label) not in by_name:
            some = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
            raise ArgumentError(
                f"`{where}` has the class {str(label)!r}, which the network does not have: it has {some}. --classes "
                "says them anew, in the order of the network's outputs."
            )
    return torch.tensor([by_name[str(label)] for label in labels]), names
