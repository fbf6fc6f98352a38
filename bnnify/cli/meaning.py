"""What the output of a network means, as the command line, the history or the data say it."""

__all__ = ["LIKELIHOODS", "Meaning"]

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import ArgumentError
from ..prediction.batches import choose
from ..training.nll import BernoulliNLL, CategoricalNLL, GaussianNLL, HeteroscedasticGaussianNLL

LIKELIHOODS = ("logits", "probabilities", "binary_logits", "gaussian", "values")


@dataclass(frozen=True)
class Meaning:
    """What an output means.

    Attributes:
        likelihood: One of the library's names; ``"values"`` is a regression.
        output: Which part of what the network returns; None for all of it.
        class_dim: The dimension of the classes; None for the last one.
        noise_std: The standard deviation of the noise of a regression; None if it is not known.
    """

    likelihood: str
    output: str | int | None = None
    class_dim: int | None = None
    noise_std: float | None = None

    @property
    def is_regression(self) -> bool:
        """Whether the network tells real numbers."""
        return self.likelihood in ("gaussian", "values")

    @property
    def for_library(self) -> Any:
        """What the library takes as ``likelihood=``: a regression whose noise is known has a density."""
        if self.likelihood == "values" and self.noise_std is not None:
            return GaussianNLL(self.noise_std)
        return self.likelihood

    @property
    def arguments(self) -> dict[str, Any]:
        """What ``predict``, ``tune_std`` and ``evaluate`` take."""
        return {"likelihood": self.for_library, "output": self.output, "class_dim": self.class_dim}

    def nll(self) -> nn.Module:
        """Make the NLL to train with; the noise of a regression is learned.

        Raises:
            ArgumentError: There is none for this likelihood.
        """
        if self.likelihood == "logits":
            return CategoricalNLL(-1 if self.class_dim is None else self.class_dim)
        if self.likelihood == "binary_logits":
            return BernoulliNLL()
        if self.likelihood == "gaussian":
            return HeteroscedasticGaussianNLL()
        if self.likelihood == "values" and self.noise_std is not None:
            return GaussianNLL(self.noise_std, learned=True)
        raise ArgumentError(f"finetune has no loss for --likelihood {self.likelihood}. Let the network return logits.")

    def chosen(self, found: Any) -> Any:
        """Choose the part of what the network returned."""
        return choose(found, self.output)
