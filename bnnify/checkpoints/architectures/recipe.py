"""Make a model again with a builder of torchvision or timm, and plain arguments."""

__all__ = ["Recipe"]

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...errors import CheckpointError
from ...torch_internals import Convolution, non_persistent_buffers
from .builders import builders, library_named
from .shapes import Difference, Shapes, shapes_of

# What a recipe may pass to a builder, and the largest value: sizes alone. Nothing here loads, downloads or names a
# class, and no size makes a layer beyond what the largest real models have.
_CLASSES, _CHANNELS = 2**20, 2**12
_ARGUMENTS: dict[str, dict[str, int | bool]] = {
    "torchvision": {
        "num_classes": _CLASSES,
        "num_keypoints": 2**12,
        "image_size": 2**11,
        "aux_logits": True,
        "aux_loss": True,
    },
    "timm": {"num_classes": _CLASSES, "in_chans": _CHANNELS, "img_size": 2**10},
}


@dataclass(frozen=True)
class Recipe:
    """Says how to make a model again, as plain data that a file may hold.

    A recipe from a file is only as trustworthy as the file, so it can do little: it calls builders that the library
    lists, with sizes from a fixed set and below fixed bounds, and never loads weights. Before making a model with
    storage from such a recipe, :meth:`check` it against the tensors of the file, which costs no memory.

    Args:
        library: ``"torchvision"`` or ``"timm"``.
        builder: One of the library's models, for example ``"resnet18"``.
        arguments: What the builder is called with. Default: ``{}``, so its own defaults.
        in_channels: The input channels that torchvision's first convolution was adapted to (timm takes ``in_chans``).
            Default: ``None``, those it has.

    Raises:
        CheckpointError: A name, a type or a size that a recipe may not have.
    """

    library: str
    builder: str
    arguments: Mapping[str, int | bool] = field(default_factory=dict)
    in_channels: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.library, str) or self.library not in _ARGUMENTS:
            raise CheckpointError(f"No recipe for a model of {self.library!r:.60}: only of {' or '.join(_ARGUMENTS)}.")
        if not isinstance(self.builder, str) or not isinstance(self.arguments, Mapping):
            raise CheckpointError("A recipe needs the name of a builder and a mapping of arguments.")
        for name, value in self.arguments.items():
            _check_argument(f"{self.builder:.60}({name!s:.60}=…)", value, _ARGUMENTS[self.library].get(name))
        if self.in_channels is not None:
            limit = None if self.library == "timm" else _CHANNELS
            _check_argument(f"{self.builder:.60} with in_channels", self.in_channels, limit)

    def __str__(self) -> str:
        arguments = ", ".join(f"{name}={value}" for name, value in self.arguments.items())
        adapted = "" if self.in_channels is None else f" with {self.in_channels} input channels"
        return f"{self.library} {self.builder}" + (f"({arguments})" if arguments else "") + adapted

    def build(self) -> nn.Module:
        """Make the model with the library's builder, without pretrained weights, on the default device.

        On the meta device (``with torch.device("meta"):``) the weights have no storage; what the constructor computes
        from numbers alone, such as the index tables of Swin, is on the CPU all the same: no state_dict could give it.

        Raises:
            CheckpointError: The library is missing, has no such builder, or the builder refuses the arguments.
        """
        if torch.empty(0).is_meta:
            with torch.device("cpu"):
                with _Weightless():
                    model = self._make()
                _compute_buffers(model)
            return model
        return self._make()

    def shapes(self, watch: Callable[[tuple[int, ...]], None] | None = None) -> Shapes:
        """Return the shapes in the model's ``state_dict``, by name, found without memory for its weights.

        Args:
            watch: Called with each matrix or kernel that the builder makes; what it raises ends the construction.
                Default: ``None``.
        """
        with torch.device("cpu"), _Weightless(watch):
            return shapes_of(self._make().state_dict())

    def check(self, state_dict: Mapping[str, Any]) -> None:
        """Raise :class:`CheckpointError` unless the model has the names and shapes of ``state_dict``."""
        if difference := Difference.between(self.shapes(), shapes_of(state_dict)):
            raise CheckpointError(f"The weights are not those of {self}: {difference}.")

    def as_data(self) -> dict[str, Any]:
        """Return the recipe as plain data, for a file."""
        return {
            "library": self.library,
            "builder": self.builder,
            "arguments": dict(self.arguments),
            "in_channels": self.in_channels,
        }

    @staticmethod
    def from_data(data: Any) -> "Recipe":
        """Make the recipe of the data in a file.

        Raises:
            CheckpointError: The data is no recipe, asks for more than a recipe may, or names an unknown builder.
        """
        if not isinstance(data, Mapping) or data.keys() != {"library", "builder", "arguments", "in_channels"}:
            raise CheckpointError("The file's record of how to make its model is not a recipe.")
        recipe = Recipe(**data)
        recipe._check_builder()
        return recipe

    def _check_builder(self) -> None:
        if self.builder not in builders(self.library):
            library = f"{self.library} {library_named(self.library)[1]}"
            raise CheckpointError(f"{library} has no builder {self.builder!r:.60}. Upgrade it, or pass the model.")

    def _make(self) -> nn.Module:
        self._check_builder()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                library = library_named(self.library)[0]
                if self.library == "timm":
                    model: nn.Module = library.create_model(self.builder, pretrained=False, **self.arguments)
                else:
                    function = library.get_model_builder(self.builder)
                    without = {"weights", "weights_backbone"} & inspect.signature(function).parameters.keys()
                    model = function(**dict.fromkeys(without), **self.arguments)
        except Exception as error:
            reason = str(error).partition("\n")[0][:200]
            raise CheckpointError(f"{self} cannot be made: {type(error).__name__}: {reason.rstrip('.')}.") from error
        if self.in_channels is not None:
            _adapt_input(model, self.in_channels, str(self))
        return model


class _Weightless(TorchFunctionMode):
    """While active, new weights are on the meta device and initialising them does nothing.

    The meta device as the default would not do: some builders compute their widths with tensors (regnet), and buffers
    that no state_dict holds would lose their values. ``watch`` is that of :meth:`Recipe.shapes`.
    """

    def __init__(self, watch: Callable[[tuple[int, ...]], None] | None = None) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES and kwargs.get("device") is None:
            made = func(*args, **kwargs | {"device": "meta"})
            if self.watch is not None and func is torch.empty and made.ndim > 1:
                self.watch(tuple(made.shape))
            return made
        if func in _FILLING:
            target = args[0] if args else kwargs.get("tensor")
            if isinstance(target, Tensor) and target.is_meta:
                return target
        return func(*args, **kwargs)


_FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.full, torch.randn}
_FILLING = {getattr(nn.init, name) for name in dir(nn.init) if name.endswith("_") and name[0] != "_"} | {
    getattr(Tensor, name) for name in ("normal_", "uniform_", "fill_", "zero_", "erfinv_", "clamp_")
}


def _check_argument(what: str, value: Any, limit: int | bool | None) -> None:
    if limit is None:
        raise CheckpointError(f"{what} is no argument that a recipe may pass.")
    if type(value) is not type(limit) or not 0 <= value <= limit:
        wanted = "True or False" if isinstance(limit, bool) else f"a whole number up to {limit}"
        raise CheckpointError(f"{what} is {value!r:.60}; a recipe may pass {wanted}.")


def _compute_buffers(model: nn.Module) -> None:
    """Give values to the buffers that no state_dict holds, where a module of timm says how."""
    for module in model.modules():
        if compute := getattr(module, "init_non_persistent_buffers", None):
            for name in non_persistent_buffers(module):
                buffer = module._buffers[name]
                if buffer is not None and buffer.is_meta:
                    module._buffers[name] = torch.empty_like(buffer, device="cpu")
            compute()


def _adapt_input(model: nn.Module, channels: int, what: str) -> None:
    """Give the first convolution another number of input channels, as people do by replacing it."""
    first = next((module for module in model.modules() if isinstance(module, Convolution)), None)
    if first is None or first.groups != 1 or first.transposed or channels < 1:
        raise CheckpointError(f"{what}: the model does not begin with a convolution that could be adapted.")
    first.in_channels = channels
    first.weight = nn.Parameter(first.weight.new_empty(first.out_channels, channels, *first.kernel_size))
    first.reset_parameters()
