"""A starting σ from the data that flow through the model: the noise of each layer as a fraction of its signal."""

__all__ = ["ResponseStd"]

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..distributions.gaussian import at_least_float32, root_mean_square
from ..distributions.initial_std import DEFAULT_POSTERIOR_STD
from ..draws.outputs import tensors_in
from ..errors import ArgumentError, ConversionError, check_positive
from ..model import BayesianModel
from ..modules.known_forwards import Forward, known_forward
from ..prediction.batches import batches_of
from ..prediction.eval_mode import evaluating
from ..prediction.known_likelihoods import LikelihoodLike
from .tune_std import tune_std

_STEP = 0.05
"""The size of a trial noise, as a fraction of the rms of a tensor; in half precision a smaller one would be lost."""

_TRIALS = 2
"""How often a trial noise is drawn for each call of a layer."""

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
    fraction; a vector gets no more than the matrices beside it. What the data do not reach gets the σ of the default.

    With a ``likelihood`` the converted model is tuned on the same data by :func:`bnnify.tune_std`: σ is then no
    larger than the predictions allow, and the fraction only where the search begins.

    The converted model keeps the σ, and neither the data nor the rule: settings and files have its rms for each tensor.

    Attributes:
        data: Inputs, in any form that :func:`bnnify.prediction.predict` takes; labels in it are left out.
        fraction: Of each layer's signal. Must be positive. Default: ``0.05``.
        likelihood: What the model's output means, as in ``predict``, to tune σ. Default: ``None``, no tuning.
        tuning: Further options of :func:`bnnify.tune_std`, such as ``{"labels": True}``. Default: without labels.
    """

    data: Any = field(repr=False)
    fraction: float = 0.05
    likelihood: LikelihoodLike | None = None
    tuning: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_positive("ResponseStd(fraction)", self.fraction)

    def measure(self, model: nn.Module, names: Iterable[str]) -> "_Measured":
        """Run the data through ``model``, in eval mode, and find σ of the parameters that have these names in it.

        Raises:
            ArgumentError: There are no data.
            ArgumentTypeError: It is not clear what of a batch are inputs.
        """
        return _Measured(_responses(model, set(names), self.data), self.fraction)

    def finish(self, bnn: BayesianModel) -> None:
        """Tune σ of the converted model, if a likelihood is known."""
        if self.likelihood is not None:
            tune_std(bnn, self.data, likelihood=self.likelihood, **{"labels": False, **self.tuning})


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
        return std.to(default.dtype).expand_as(weight).clone()


def _along(response: Tensor, weight: Tensor, dim: int) -> Tensor:
    """Lay a response of each output unit along the dimension of a weight that belongs to them."""
    if weight.shape[dim] != len(response):  # a transposed convolution with groups has units along two dimensions
        return root_mean_square(response)
    return response.reshape([-1 if d == dim else 1 for d in range(weight.ndim)])


def _responses(model: nn.Module, names: set[str], data: Any) -> dict[str, Tensor]:
    with evaluating(model), torch.no_grad(), _without_fast_path():
        batches = batches_of(data, model)
        first = next(batches, None)
        if first is None:
            raise ArgumentError("ResponseStd was given data without batches.")
        probes = _probes(model, names, lambda: model(*first[0], **first[1]))
        hooks = [
            module.register_forward_hook(probe.observe, with_kwargs=True)
            for module, found in probes.items()
            for probe in found
        ]
        try:
            for args, kwargs in chain([first], batches):
                model(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
    return {name: response for found in probes.values() for probe in found for name, response in probe.result().items()}


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """Let transformer layers of torch call what is in them, as they do in train mode."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _probes(model: nn.Module, names: set[str], run: Callable[[], Any]) -> dict[nn.Module, list["_Linear | _Trial"]]:
    """Choose where each parameter is observed: at its own module if that is called, else at the closest around it."""
    called: set[nn.Module] = set()
    hooks = [module.register_forward_hook(lambda module, *_: called.add(module)) for module in model.modules()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    modules = dict(model.named_modules(remove_duplicate=False))
    probes: dict[nn.Module, list[_Linear | _Trial]] = {}
    trials: dict[tuple[nn.Module, str], dict[str, str]] = {}
    for name in sorted(names):
        path, _, attribute = name.rpartition(".")
        layer = modules[path]
        cls = getattr(type(layer), "_plain_class", type(layer))
        forward = known_forward(cls) if layer in called and "forward" not in vars(layer) else None
        if forward and attribute in ("weight", "bias"):
            linear = next((probe for probe in probes.get(layer, []) if isinstance(probe, _Linear)), None)
            if linear is None:
                linear = _Linear(layer, path, forward)
                probes.setdefault(layer, []).append(linear)
            linear.attributes.add(attribute)
            continue
        while modules[path] not in called and path:
            path = path.rpartition(".")[0]
        if modules[path] in called:
            trials.setdefault((modules[path], path), {})[name.removeprefix(path).lstrip(".")] = name
    for (module, _), parameters in trials.items():
        probes.setdefault(module, []).append(_Trial(parameters))
    return probes


class _Signal:
    """The variance of each unit of an output, over the data and all places that a unit has."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, rows: Tensor) -> None:
        """Add outputs, shape (places, units)."""
        rows = rows.double()
        self.count += len(rows)
        self.total = self.total + rows.sum(0)
        self.squares = self.squares + rows.square().sum(0)

    def variance(self) -> Tensor:
        return torch.as_tensor(self.squares / self.count - (self.total / self.count) ** 2).clamp_min(0)


class _Linear:
    """Observes a layer that is linear in its weight, whose response follows from E‖x‖²."""

    def __init__(self, layer: nn.Module, path: str, forward: Forward) -> None:
        self.layer, self.path, self.forward = layer, path, forward
        self.attributes: set[str] = set()
        self.signal, self.norms = _Signal(), _Signal()

    def observe(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        forward = self.forward
        inputs, *rest = args or (kwargs.pop("input"),)
        # Weights of 1 sum the squares over just what each unit is connected to, padding, stride and groups included.
        squares = forward.apply(layer, at_least_float32(inputs).square(), self._ones(), None, *rest, **kwargs)
        self.signal.add(_rows(output, forward.channel))
        self.norms.add(_rows(squares, forward.channel))

    def _ones(self) -> Tensor:
        weight: Any = self.layer.weight
        return torch.ones_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))

    def result(self) -> dict[str, Tensor]:
        if not self.signal.count:
            return {}
        norm = torch.as_tensor(self.norms.total) / self.norms.count
        norm = norm + 1 if getattr(self.layer, "bias", None) is not None else norm
        # Inputs that are all zero tell nothing: their 0/0 becomes 0, for which the default stands in.
        response = (self.signal.variance() / norm).sqrt().nan_to_num(nan=0.0 if not norm.isnan().any() else torch.nan)
        return {f"{self.path}.{name}".lstrip("."): response for name in self.attributes}


class _Trial:
    """Observes a module whose response is found by trying noise on its parameters, one tensor at a time."""

    def __init__(self, parameters: Mapping[str, str]) -> None:
        self.parameters = parameters  # the names in the module, and those in the model
        self.signal = _Signal()
        self.moved: dict[str, float] = {}
        self.vectors: set[str] = set()
        self._busy = False

    def observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._busy:  # a trial calls the module once more
            return
        rows = _first(output)
        if rows is None:
            return
        self.signal.add(rows)
        self._busy = True
        try:
            for name in self.parameters:
                weight = module.get_parameter(name)
                if weight.ndim < 2:
                    self.vectors.add(name)
                generator = torch.Generator(weight.device).manual_seed(0)
                for _ in range(_TRIALS):
                    noise = torch.randn(weight.shape, generator=generator, device=weight.device, dtype=weight.dtype)
                    trial = functional_call(module, {name: weight + _step(weight) * noise}, args, kwargs)
                    squares = (_first(trial).double() - rows.double()).square().sum().item() / _TRIALS  # type: ignore[union-attr]
                    self.moved[name] = self.moved.get(name, 0.0) + squares / _step(weight).double().item() ** 2
        finally:
            self._busy = False

    def result(self) -> dict[str, Tensor]:
        if not self.signal.count:
            return {}
        signal = self.signal.variance().sum() * self.signal.count
        found = {name: (signal / moved).sqrt() for name, moved in self.moved.items() if moved > 0}
        # A bias moves every example alike, which its layer's matrices cannot.
        least = min((found[name] for name in found.keys() - self.vectors), default=torch.tensor(torch.inf))
        return {
            self.parameters[name]: response.minimum(least) if name in self.vectors else response
            for name, response in found.items()
        }


def _step(weight: Tensor) -> Tensor:
    own = root_mean_square(weight)
    return _STEP * torch.where(own > 0, own, torch.ones_like(own))


def _first(output: Any) -> Tensor | None:
    """The first floating-point tensor of an output, shape (places, units): its last dimension counts units."""
    found = next((tensor for tensor in tensors_in(output) if tensor.is_floating_point()), None)
    return None if found is None else _rows(found, -1)


def _rows(output: Tensor, channel: int) -> Tensor:
    """Bring an output into the shape (places, units), where units lie along the dimension ``channel``."""
    if output.ndim == 0:
        return output.reshape(1, 1)
    return output.movedim(channel, -1).flatten(0, -2) if output.ndim > 1 else output[None]
