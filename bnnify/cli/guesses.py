"""What the data and the file suggest where nobody says it: the meaning of the output, and the names of the classes."""

__all__ = ["guessed_likelihood", "known_classes"]

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import ArgumentError
from ..model import BayesianModel
from .data import Examples


def guessed_likelihood(found: Any, targets: Tensor | None, examples: Examples, bnn: BayesianModel) -> str:
    """Take the output for what it must be, given the targets."""
    if isinstance(found, (tuple, list)) and len(found) == 2:
        return "gaussian"
    one = isinstance(found, Tensor) and found[0].numel() == 1
    if targets is not None and not (one and examples.classes):  # names are no numbers
        whole = not targets.is_floating_point()
        if not whole or (one and int(targets.max()) > 1):
            return "values"
        if not one:
            return "logits"
    elif one and not examples.classes and examples.pictures is None:
        return "values"
    elif not one and (examples.pictures is not None or bnn.origin.recipe is not None or bnn.origin.config is not None):
        return "logits"
    raise ArgumentError(
        "Nothing tells what the network's output means. Say it with --likelihood: logits (classes), binary_logits "
        "(yes or no), values (a regression), gaussian (a pair of mean and variance)."
    )


def known_classes(origin: Any) -> tuple[str, ...]:
    """The names of the classes that the file's origin tells: of a Hugging Face config, or of ImageNet."""
    config: Mapping[str, Any] = origin.config or {}
    if isinstance(config.get("id2label"), Mapping):
        return tuple(map(str, config["id2label"].values()))
    if origin.recipe is not None and origin.recipe.library == "torchvision" and not origin.recipe.arguments:
        from torchvision import models

        weights = getattr(models.get_model_weights(origin.recipe.builder), "DEFAULT", None)
        return tuple(weights.meta.get("categories", ())) if weights is not None else ()
    return ()
