"""The prior with a mean and a standard deviation of its own for each weight, which a posterior can become."""

__all__ = ["Elementwise"]

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import ConversionError
from .densities import gaussian_log_prob
from .gaussian import at_least_float32, dtype_of_rho
from .prior import KLTerms, Posterior, Prior


@dataclass(frozen=True)
class StdOfPrior:
    """The rule by which a posterior starts with the σ of an :class:`Elementwise` prior."""

    prior: "Elementwise"

    def __str__(self) -> str:
        return "that of the prior"

    def of(self, names: Sequence[str], weight: Tensor, scale: float, units_dim: int) -> Tensor:
        return self.prior.beside(weight)["prior_std"]


@dataclass(frozen=True, repr=False)
class Elementwise(Prior):
    """p(w) = N(m, s²) with m and s of each weight. :func:`bnnify.posterior_of` makes one for each parameter.

    A converted parameter keeps m and s beside it, as ``*_prior_mean`` and ``*_prior_std``, and files have them there.
    Where ``std`` is given and no ``posterior_std``, the posterior starts with σ = s.

    Args:
        mean: m, of the weight's shape. Default: the pretrained weights.
        std: s, positive, of the weight's shape. Default: ones.
    """

    mean: Tensor | None = field(default=None, compare=False)
    std: Tensor | None = field(default=None, compare=False)
    centred = True
    elementwise = True
    needs_initial_std = False

    def __repr__(self) -> str:
        given = [name for name in ("mean", "std") if getattr(self, name) is not None]
        return f"Elementwise({', '.join(given)})"

    def beside(self, weight: Tensor) -> dict[str, Tensor]:
        """Return m and s for ``weight``.

        Raises:
            ConversionError: They are not of its shape, or not finite, or some s is not positive.
        """
        mean = weight if self.mean is None else self._checked("mean", self.mean, weight).to(weight)
        dtype = dtype_of_rho(weight.dtype)
        if self.std is None:
            return {"prior_mean": mean, "prior_std": torch.ones_like(weight, dtype=dtype)}
        std = self._checked("std", self.std, weight).to(weight.device, dtype)
        if not (std.is_meta or (std > 0).all()):
            raise ConversionError("The std of an Elementwise prior must be positive for each weight.")
        return {"prior_mean": mean, "prior_std": std}

    @staticmethod
    def _checked(name: str, value: Tensor, weight: Tensor) -> Tensor:
        if value.shape != weight.shape or not (value.is_meta or value.isfinite().all()):
            raise ConversionError(
                f"The {name} of an Elementwise prior must be finite and of the weight's shape {tuple(weight.shape)}; "
                f"found one of shape {tuple(value.shape)}. Take it of a model of the same architecture."
            )
        return value

    @property
    def kept(self) -> "Elementwise":
        return Elementwise()

    @property
    def posterior_std(self) -> StdOfPrior | None:
        return None if self.std is None else StdOfPrior(self)

    def terms(self, posterior: Posterior) -> KLTerms:
        return KLTerms(-0.5, posterior.required("prior_mean", _HINT), posterior.required("prior_std", _HINT))

    def kl(self, posterior: Posterior) -> Tensor:
        return self.terms(posterior).kl(posterior)

    def penalty(self, posterior: Posterior) -> Tensor:
        mean, std = (posterior.required(name, _HINT) for name in ("prior_mean", "prior_std"))
        return -gaussian_log_prob(posterior.wide_mean - at_least_float32(mean), std)


_HINT = "An Elementwise prior has it once its parameter is converted."
