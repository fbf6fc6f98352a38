"""What an exported file computes: averages over its networks, by name, beside the networks' own outputs."""

__all__ = ["NETWORKS", "Served", "named_outputs"]

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..errors import ArgumentError
from ..model import stacked
from ..prediction.averages import Averages, Prediction
from ..prediction.likelihood import Likelihood
from .networks import Networks
from .trace import Named

NETWORKS = "networks"
"""The output that holds those of all networks."""

_AVERAGES = [field.name for field in dataclasses.fields(Prediction) if field.name not in ("num_samples", "class_dim")]
_AVERAGES += [name for name, value in vars(Prediction).items() if isinstance(value, property)]


class Served(Named):
    """Networks, and what is told of their outputs.

    Args:
        networks: The networks.
        likelihood: What their outputs mean.
        names: The wanted ones, as for :func:`named_outputs`.
    """

    def __init__(self, networks: Networks, likelihood: Likelihood, names: Sequence[str] | None) -> None:
        super().__init__(networks.signature)
        self.without_batch = networks.without_batch
        self.networks = networks
        self._likelihood, self._names = likelihood, names

    def compute(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return named_outputs(self.networks(*args, **kwargs), self._likelihood, self._names)


def named_outputs(
    found: list[Any], likelihood: Likelihood, names: Sequence[str] | None, rows: int | None = None
) -> dict[str, Tensor]:
    """Compute the outputs with these ``names`` from those of each network, for ``rows`` examples.

    ``"networks"`` is all of them, in which a tensor of shape ``(...)`` has become ``(K, ...)``; of several tensors each
    has a name with its key or number, such as ``networks_logits``. The other names are those of a
    :class:`~bnnify.prediction.Prediction`. None stands for what people look at: of classes the mean, the predictive
    entropy and the mutual information, of numbers the mean and the standard deviations.

    Raises:
        ArgumentError: A name is unknown, or the likelihood does not tell what is asked for.
    """
    if names is not None and (unknown := [name for name in names if name not in (NETWORKS, *_AVERAGES)]):
        raise ArgumentError(f"Unknown output {unknown[0]!r}: known are {', '.join([NETWORKS, *_AVERAGES])}.")
    values: dict[str, Tensor] = {}
    if names is None or set(names) != {NETWORKS}:
        averages = Averages(likelihood, rows)
        for each in found:
            averages.add(each)
        prediction = averages.prediction()
        names = _usual(prediction) if names is None else names
    for name in names:
        value = stacked(found) if name == NETWORKS else getattr(prediction, name)
        if value is None:
            raise ArgumentError(f"likelihood={likelihood.name!r} tells no {name}. Leave it out of outputs=.")
        values |= _flat(name, value)
    return values


def _usual(prediction: Prediction) -> Sequence[str]:
    if prediction.predictive_entropy is not None:
        return "mean", "predictive_entropy", "mutual_information"
    both = ("aleatoric_std", "total_std")
    return "mean", "epistemic_std", *(both if prediction.aleatoric_std is not None else ())


def _flat(name: str, value: Any) -> dict[str, Tensor]:
    """The tensors in nested containers, by a name with the keys and numbers that lead there."""
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, Mapping):
        parts = list(value.items())
    else:
        parts = list(enumerate(value)) if isinstance(value, (list, tuple)) else []
    return {path: leaf for key, part in parts for path, leaf in _flat(f"{name}_{key}", part).items()}
