"""A starting σ from the data that flow through the model: the noise of each layer as a fraction of its signal."""

__all__ = ["ResponseStd"]

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..distributions.gaussian import root_mean_square
from ..distributions.initial_std import DEFAULT_POSTERIOR_STD
from ..errors import ConversionError, check_positive
from ..model import BayesianModel
from ..modules.settings import is_bayesian
from ..prediction.batches import batches_of, is_one_batch, rows_of
from ..prediction.known_likelihoods import LikelihoodLike
from .responses import responses
from .tune_std import tune_std

_FLOOR = 1e-3
"""The least σ of a unit, as a fraction of that of its layer: a unit that never changes would have none at all."""


@dataclass(frozen=True, eq=False)
class ResponseStd:
    """``σ_i = fraction · std(y_i) / √(E‖x‖² + 1)``: the noise at the output of unit i is this fraction of its signal.

    The signal is how much the layer's output y_i varies over the data, and ‖x‖² sums over what the unit is connected
    to, with 1 for its bias if it has one, whose σ is the same. So the same fraction means the same in every layer of
    every network, however its weights are scaled, where a fraction of the weights' size breaks some and does nothing
    to others. No labels are needed; some hundred examples do. Give it to :func:`bnnify.convert`, which runs them::

        bnn = bnnify.convert(model, posterior_std=bnnify.ResponseStd(loader))

    For Linear and (transposed) convolutions with torch's own forward σ follows from one pass over the data. For any
    other layer (attention, recurrent ones, what a user registered) noise is tried on each tensor, and σ, one for the
    whole tensor, is such that the output of the layer, or of the closest module around it that is called, moves by the
    fraction; a vector gets no more than the matrices beside it, and nothing more than the rms of its weights. For that
    a module runs again with the arguments and the state that it was called with, and has to give the same output.

    What the data do not reach gets the σ of the default. The model's state, its buffers and attributes, stays.

    With a ``likelihood`` the converted model is tuned on the same data by :func:`bnnify.tune_std`: σ is then no
    larger than the predictions allow, and the fraction only where the search begins.

    The converted model keeps the σ, and neither the data nor the rule: settings and files have its rms for each tensor.

    Attributes:
        data: Inputs, in any form that :func:`bnnify.prediction.predict` takes; labels in it are left out. Of what gives
            batches the first are read, until they have ``num_data`` examples.
        fraction: Of each layer's signal. Must be positive. Default: ``0.05``.
        likelihood: What the model's output means, as in ``predict``, to tune σ. Default: ``None``, no tuning.
        tuning: Further options of :func:`bnnify.tune_std`, such as ``{"labels": True}``. Default: without labels.
        num_data: How many examples are enough. Default: ``512``.
    """

    data: Any = field(repr=False)
    fraction: float = 0.05
    likelihood: LikelihoodLike | None = None
    tuning: Mapping[str, Any] = field(default_factory=dict)
    num_data: int = 512
    _taken: list[Any] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        check_positive("ResponseStd(fraction)", self.fraction)
        check_positive("ResponseStd(num_data)", self.num_data)

    def measure(self, model: nn.Module, names: Iterable[str]) -> "_Measured":
        """Run the data through ``model``, in eval mode, and find σ of the parameters that have these names in it.

        Raises:
            ArgumentError: There are no data.
            ArgumentTypeError: It is not clear what of a batch are inputs.
            ConversionError: A layer's response cannot be found; or the rule is to tune σ, and some of it is there.
        """
        if self.likelihood is not None and any(map(is_bayesian, model.modules())):
            raise ConversionError(
                "ResponseStd(likelihood) would tune σ of what is Bayesian already, too. Leave the likelihood out, and "
                "call bnnify.tune_std afterwards if you want that."
            )
        return _Measured(responses(model, set(names), self._read(model)), self.fraction)

    def finish(self, bnn: BayesianModel) -> None:
        """Tune σ of the converted model, if a likelihood is known."""
        if self.likelihood is not None:
            tune_std(bnn, self._read(bnn.module), likelihood=self.likelihood, **{"labels": False, **self.tuning})

    def _read(self, model: nn.Module) -> Any:
        """The data that are looked at: one batch, or the first of many, which are read once."""
        if is_one_batch(self.data):
            return self.data
        if not self._taken:
            rows = 0
            for batch in self.data:
                self._taken.append(batch)
                rows += sum(rows_of(arguments) or 0 for arguments in batches_of(iter([batch]), model))
                if rows >= self.num_data:
                    break
        return self._taken and iter(self._taken)


@dataclass(frozen=True, eq=False)
class _Measured:
    """The rule once the data were seen.

    Attributes:
        responses: σ at a fraction of 1, by the name of a parameter: a number, or one for each output unit.
        fraction: See :class:`ResponseStd`.
    """

    responses: Mapping[str, Tensor] = field(repr=False)
    fraction: float

    def __str__(self) -> str:
        return f"ResponseStd(fraction={self.fraction})"

    def of(self, names: Sequence[str], weight: Tensor, scale: float, units_dim: int = 0) -> Tensor:
        """σ of the parameter that has these names, of its shape; of a tied one, what its least tolerant use bears.

        Raises:
            ConversionError: The response is not finite, as that of inputs that are not.
        """
        default = DEFAULT_POSTERIOR_STD(weight.movedim(units_dim, 0), scale)
        found = [self.responses[name].to(weight.device) for name in names if name in self.responses]
        found = [response if response.ndim == 0 else _along(response, weight, units_dim) for response in found]
        if not found:
            return default.expand_as(weight).clone()
        response = found[0]
        for other in found[1:]:
            response = torch.minimum(response, other)
        if not response.isfinite().all():
            raise ConversionError(f"ResponseStd: under the data the output of `{names[0]}` is not finite.")
        largest = response.max()
        std = torch.where(largest > 0, self.fraction * response.maximum(_FLOOR * largest), default)
        if response.ndim == 0:  # small noise was tried, which tells nothing of what is larger than the weights
            own = root_mean_square(weight)
            std = torch.where(own > 0, std.minimum(own), std)
        return std.to(default.dtype).expand_as(weight).clone()


def _along(response: Tensor, weight: Tensor, dim: int) -> Tensor:
    """Lay a response of each output unit along the dimension of a weight that belongs to them."""
    if weight.shape[dim] != len(response):  # a transposed convolution with groups has units along two dimensions
        return root_mean_square(response)
    return response.reshape([-1 if d == dim else 1 for d in range(weight.ndim)])
