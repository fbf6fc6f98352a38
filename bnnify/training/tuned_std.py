"""The result of tune_std."""

__all__ = ["TunedStd"]

from collections.abc import Mapping
from dataclasses import dataclass, field

_LEAST_GAIN = 1e-3
"""The NLL in nats per datum below which noise has gained hardly anything."""

_LEAST_RATIO = 2.0**-6
"""The rms(σ) / rms(μ) up to which there is hardly any noise."""

_MOST_RATIO = 1.0
"""The rms(σ) / rms(μ) at which the search without labels ends."""


@dataclass(frozen=True)
class TunedStd:
    """The factor by which :func:`bnnify.tune_std` has multiplied σ; ``str()`` says in a line what came of it.

    Losses are in nats per datum: with labels the NLL of the averaged prediction, without them the KL from the mean
    network's own prediction to the averaged one.

    Attributes:
        factor: The common factor on every σ.
        factors: With ``per_layer``, the factor of each layer by its qualified name; empty otherwise.
        before: The loss with the σ as they were.
        after: The loss with the σ as they are now.
        deterministic: The loss of the mean network, which has no noise; without labels it is 0.
        ratio: rms(σ) / rms(μ) over all weights, as it is now.
        num_data: How many data counted.
        tried: Every common factor that was tried with its loss, in the order of trying.
        tolerance: The KL that was allowed; None if there were labels.
    """

    factor: float
    before: float
    after: float
    deterministic: float
    ratio: float
    num_data: int
    factors: Mapping[str, float] = field(default_factory=dict)
    tried: tuple[tuple[float, float], ...] = ()
    tolerance: float | None = None

    @property
    def hardly_any_noise(self) -> bool:
        """True if σ is at the low end of the search, or with labels gains less than 0.001 nats over no σ."""
        gains = self.tolerance is not None or self.deterministic - self.after >= _LEAST_GAIN
        return self.ratio <= _LEAST_RATIO * (1 + 1e-3) or not gains or self._fails

    @property
    def _fails(self) -> bool:
        return self.tolerance is not None and not self.after <= self.tolerance

    def __str__(self) -> str:
        how = f"σ × {self.factor:.3g}, now {self.ratio:.3g} of the weights' rms"
        if self.factors:
            how += f"; per layer × {min(self.factors.values()):.3g} to × {max(self.factors.values()):.3g}"
        if self.tolerance is None:
            what = f"NLL {self.before:.4f} → {self.after:.4f}, of the mean network {self.deterministic:.4f}"
            meaning = "the network is about as certain as it should be, and noise gains next to nothing"
        else:
            what = f"KL from the mean network {self.before:.4f} → {self.after:.4f}, allowed {self.tolerance:g}"
            meaning = "the network bears no more" if not self._fails else "even so little exceeds the tolerance"
        end = f". Hardly any noise: {meaning}." if self.hardly_any_noise else "."
        if self.tolerance is not None and self.ratio >= _MOST_RATIO * (1 - 1e-3):
            end = ". No larger σ is tried: the output hardly depends on the weights; are they trained?"
        return f"{how}: {what} (nats per datum, {self.num_data:,} data){end}"
