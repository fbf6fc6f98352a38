"""How badly held-out observations fit their predictions, and the quantile of that, as MAPIE computes them."""

__all__ = ["finite_sample_quantile", "scores_of_classes"]

import math
from typing import Any

from torch import Tensor

from ..errors import ArgumentError, needing


def scores_of_classes(caller: str, score: str, probabilities: Tensor, labels: Tensor) -> Tensor:
    """The scores ``"lac"`` or ``"aps"`` of labels of shape (N,); those of ``"aps"`` are randomised, from a fixed seed.

    Raises:
        MissingLibraryError: MAPIE is not installed.
    """
    with needing("MAPIE", caller):
        from mapie.conformity_scores import APSConformityScore, LACConformityScore
    found: Any = LACConformityScore() if score == "lac" else APSConformityScore()
    found.set_external_attributes(classes=list(range(probabilities.shape[-1])), random_state=0)
    y = labels.cpu().numpy()
    scores = found.get_conformity_scores(y, probabilities.cpu().numpy(), y_enc=y)
    return labels.new_tensor(scores, dtype=probabilities.dtype).flatten()


def finite_sample_quantile(caller: str, scores: Tensor, coverage: float) -> float:
    """The ⌈(N + 1)·coverage⌉-th smallest of N scores: with this probability another one is no larger.

    Raises:
        ArgumentError: There is none, because the data are too few.
        MissingLibraryError: MAPIE is not installed.
    """
    with needing("MAPIE", caller):
        import numpy as np
        from mapie.conformity_scores import LACConformityScore
    number, alpha = len(scores), 1 - coverage
    if np.ceil((number + 1) * (1 - alpha)) > number:
        raise ArgumentError(
            f"{caller}: {number} data are too few to guarantee a coverage of {coverage}. Give at least "
            f"{math.ceil(round(coverage / alpha, 6))}, or ask for less."
        )
    columns = scores.cpu().numpy().reshape(-1, 1)
    return float(LACConformityScore().get_conformity_score_quantiles(columns, np.array([alpha]), cv="prefit")[0])
