"""Observers of a layer's outputs, from which it follows how much σ its parameters bear."""

__all__ = ["LinearProbe", "TrialProbe", "Trying"]

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from ..distributions.gaussian import at_least_float32, root_mean_square
from ..draws.outputs import tensors_in
from ..errors import ConversionError
from ..modules.known_forwards import Forward
from ..prediction.batches import Arguments
from .module_state import ModuleState, cloned

_STEP = 0.05
"""The size of a trial noise, as a fraction of the rms of a tensor; in half precision a smaller one would be lost."""

_TRIALS = 2
"""How often a trial noise is drawn for each call of a layer."""

_SAME = 1e-6
"""The share of an output's squares by which it may differ when a module is called again: rounding, on some devices."""

_ROUNDING = 1e-12
"""The share of the mean square of an output that its variance may be by rounding alone, in float32."""


class Trying:
    """Whether a trial runs: what it calls in a module must not be observed."""

    def __init__(self) -> None:
        self.runs = False


class _Signal:
    """The variance of each unit of an output, over the data and all places that a unit has."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Any = 0.0
        self.squares: Any = 0.0

    def add(self, rows: Tensor) -> None:
        """Add outputs, shape (places, units)."""
        rows = rows.double()
        self.count += len(rows)
        self.total = self.total + rows.sum(0)
        self.squares = self.squares + rows.square().sum(0)

    def variance(self) -> Tensor:
        square = self.squares / self.count
        variance = square - (self.total / self.count) ** 2
        return torch.where(variance < _ROUNDING * square, 0.0, variance)


class LinearProbe:
    """Observes a layer that is linear in its weight, whose response follows from E‖x‖²."""

    def __init__(self, layer: nn.Module, path: str, forward: Forward, trying: Trying) -> None:
        self.layer, self.path, self.forward, self.trying = layer, path, forward, trying
        self.attributes: set[str] = set()
        self.signal, self.norms = _Signal(), _Signal()

    def attach(self, module: nn.Module) -> list[RemovableHandle]:
        # Before the hooks of a user, who may change the output.
        return [module.register_forward_hook(self.observe, prepend=True, with_kwargs=True)]

    def observe(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if self.trying.runs:
            return
        inputs, *rest = args or (kwargs["input"],)
        others = {key: value for key, value in kwargs.items() if key != "input"}
        # Weights of 1 sum the squares over just what each unit is connected to, padding, stride and groups included.
        with torch.autocast(inputs.device.type, enabled=False):
            squares = self.forward.apply(layer, self._squares(inputs), self._ones(), None, *rest, **others)
        self.signal.add(_rows(output, self.forward.channel))
        self.norms.add(_rows(squares, self.forward.channel))

    def _squares(self, inputs: Tensor) -> Tensor:
        return at_least_float32(inputs).square().to(self._ones().dtype)

    def _ones(self) -> Tensor:
        weight: Any = self.layer.weight
        return torch.ones_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))

    def result(self) -> dict[str, Tensor]:
        if not self.signal.count:
            return {}
        norm = self.norms.total / self.norms.count
        norm = norm + 1 if getattr(self.layer, "bias", None) is not None else norm
        # Inputs that are all zero tell nothing: their 0/0 becomes 0, for which the default stands in.
        response = (self.signal.variance() / norm).sqrt().nan_to_num(nan=0.0 if not norm.isnan().any() else torch.nan)
        return {f"{self.path}.{name}".lstrip("."): response for name in self.attributes}


class TrialProbe:
    """Observes a module whose response is found by trying noise on its parameters, one tensor at a time."""

    def __init__(self, path: str, parameters: Mapping[str, str], trying: Trying) -> None:
        self.path, self.trying = path, trying
        self.parameters = parameters  # the names in the module, and those in the model
        self.signal = _Signal()
        self.moved: dict[str, float] = {}
        self.vectors: set[str] = set()
        self._calls: list[tuple[Arguments, ModuleState]] = []

    def attach(self, module: nn.Module) -> list[RemovableHandle]:
        # A trial runs the hooks of a user too, so it takes the arguments from before the first of them.
        return [
            module.register_forward_pre_hook(self.begin, prepend=True, with_kwargs=True),
            module.register_forward_hook(self.observe, with_kwargs=True),
        ]

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.trying.runs:
            self._calls.append((cloned((args, kwargs)), ModuleState(module)))

    def observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.trying.runs:
            return
        (arguments, before), after = self._calls.pop(), ModuleState(module)
        rows = _first(output)
        if rows is None:
            return
        self.signal.add(rows)

        def moved_by(parameters: dict[str, Tensor]) -> float:
            """The sum of squares by which the output moves; infinite if its shape changes."""
            args, kwargs = cloned(arguments)
            before.restore()
            found = _first(functional_call(module, parameters, args, kwargs))
            if found is None or found.shape != rows.shape:
                return math.inf
            return (found.double() - rows.double()).square().sum().item()

        self.trying.runs = True
        try:
            if moved_by({}) > _SAME * rows.double().square().sum().item():
                raise _not_repeated(module, self.path, self.parameters.values())
            for name in self.parameters:
                weight = module.get_parameter(name)
                if weight.ndim < 2:
                    self.vectors.add(name)
                step = _step(weight)
                generator = torch.Generator(weight.device).manual_seed(0)
                for _ in range(_TRIALS):
                    noise = torch.randn(weight.shape, generator=generator, device=weight.device, dtype=weight.dtype)
                    squares = moved_by({name: weight + step * noise}) / _TRIALS
                    self.moved[name] = self.moved.get(name, 0.0) + squares / step.double().item() ** 2
        finally:
            self.trying.runs = False
            after.restore()

    def result(self) -> dict[str, Tensor]:
        if not self.signal.count:
            return {}
        signal = self.signal.variance().sum() * self.signal.count
        found = {name: (signal / moved).sqrt() for name, moved in self.moved.items() if moved > 0}
        # A bias moves every example alike, which its layer's matrices cannot.
        least = min(
            (found[name] for name in found.keys() - self.vectors), default=torch.tensor(torch.inf, device="cpu")
        )
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


def _not_repeated(module: nn.Module, path: str, parameters: Iterable[str]) -> ConversionError:
    names = "`, `".join(sorted(parameters))
    called = f"`{path}` ({type(module).__name__})" if path else f"the model ({type(module).__name__})"
    return ConversionError(
        f"ResponseStd tries noise on `{names}` by calling {called} again, which does not give the same output: it "
        "draws random numbers, or keeps something from one call to the next. Give another posterior_std to these "
        "parameters, with a mapping from globs."
    )
