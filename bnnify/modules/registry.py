"""The layer types that ``convert`` knows, with the names of their weights; a user may add to them."""

__all__ = ["Layer", "layer_of", "register_layer", "units_dim"]

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import Tensor, nn

from ..errors import ConversionError
from ..torch_internals import BatchOrInstanceNorm, Convolution, TransposedConvolution, flat_weight_names
from .settings import plain_class

Names: TypeAlias = Sequence[str] | Callable[[Any], Sequence[str]]


@dataclass(frozen=True)
class Layer:
    """A type of layer, as :func:`register_layer` describes one; ``units_dim`` may be a function of the layer too."""

    type: type[nn.Module] | str
    names: Names
    by_default: bool = True
    units_dim: int | Callable[[Any], int] = 0

    def describes(self, module: nn.Module) -> bool:
        """Tell whether ``module`` is of this type or of a subclass."""
        if not isinstance(self.type, str):
            return isinstance(module, self.type)
        return any(fnmatchcase(f"{cls.__module__}.{cls.__qualname__}", self.type) for cls in type(module).__mro__)

    def may_miss(self, module: nn.Module, name: str) -> bool:
        """Tell whether the parameter ``name`` may be a weight that is not in :attr:`names`.

        It may if a subclass that nobody has registered added it, or if all that is known is that the class is named
        like a norm.
        """
        if name in self.names_in(module):
            return False
        if isinstance(self.type, str):
            return not self.names
        return self.by_default and plain_class(module) is not self.type

    def names_in(self, module: nn.Module) -> Sequence[str]:
        """List the names of the weights of ``module``, some of which it may lack."""
        return self.names(module) if callable(self.names) else self.names


def register_layer(
    layer: type[nn.Module] | str, parameters: Names, *, by_default: bool = True, units_dim: int = 0
) -> None:
    """Teach :func:`bnnify.convert` which parameters of a layer type are its weights.

    Nothing else needs to be known of the layer: whatever reads one of these parameters during a draw gets its sample.
    Of several registered types that a layer is an instance of, the one registered last holds; so a type that is
    registered again, or a subclass of a known one, gets the new parameters.

    Args:
        layer: The class, subclasses included, or a glob of its qualified name, such as ``"mylib.layers.*Conv"``.
        parameters: The names of the parameters, or a function that gives them for an instance. A name that an instance
            lacks, or that is None there, is passed over.
        by_default: Convert them even where no ``select`` is given. Default: ``True``.
        units_dim: The dimension of the weights along which the layer's output units lie, for rules of σ that count
            them. Default: ``0``, as in ``nn.Linear``.

    Raises:
        ConversionError: ``layer`` is neither a module class nor a glob, or ``parameters`` is not a list of names.

    Example::

        >>> class Scale(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.factor = nn.Parameter(torch.ones(3))
        >>> bnnify.register_layer(Scale, ["factor"])
        >>> bnnify.convert(Scale()).report.bayesian[0].name
        'factor'
    """
    if not isinstance(layer, str) and not (isinstance(layer, type) and issubclass(layer, nn.Module)):
        raise ConversionError(f"Cannot register {layer!r}: give a subclass of torch.nn.Module, or a glob of its name.")
    names = (
        isinstance(parameters, Sequence)
        and not isinstance(parameters, str)
        and all(isinstance(name, str) for name in parameters)
    )
    if not (names or callable(parameters)) or isinstance(parameters, nn.Module):
        raise ConversionError(f"Cannot register {layer!r}: give a list of names of parameters, not {parameters!r}.")
    _LAYERS.insert(0, Layer(layer, parameters, by_default, units_dim))


def layer_of(module: nn.Module) -> Layer | None:
    """Find the description of the type of ``module``; None if it is unknown."""
    return next((layer for layer in _LAYERS if layer.describes(module)), None)


def units_dim(module: nn.Module, parameter: Tensor) -> int:
    """Find the dimension of ``parameter``, a weight or bias of ``module``, along which the layer's output units lie."""
    layer = layer_of(module)
    dim = 0 if layer is None else layer.units_dim(module) if callable(layer.units_dim) else layer.units_dim
    return dim if dim < parameter.ndim else 0


_WEIGHT_AND_BIAS = ("weight", "bias")
_PROJECTIONS = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")

_LAYERS = [
    Layer(nn.Linear, _WEIGHT_AND_BIAS),
    # With groups the outputs lie along both of the first dimensions; the inputs, mostly as many, are near enough.
    Layer(TransposedConvolution, _WEIGHT_AND_BIAS, units_dim=lambda layer: 1 if layer.groups == 1 else 0),
    Layer(Convolution, _WEIGHT_AND_BIAS),
    Layer(nn.Bilinear, _WEIGHT_AND_BIAS),
    Layer(nn.MultiheadAttention, ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias")),
    Layer(nn.RNNBase, flat_weight_names),
    Layer(nn.RNNCellBase, ("weight_ih", "weight_hh", "bias_ih", "bias_hh")),
    Layer(nn.Embedding, ("weight",), by_default=False),
    Layer(nn.EmbeddingBag, ("weight",), by_default=False),
    # Known to have no weights that a module's name in `select` would take: these are scales, shifts and slopes.
    *(Layer(norm, (), by_default=False) for norm in (BatchOrInstanceNorm, nn.GroupNorm, nn.PReLU)),
    *(Layer(norm, (), by_default=False) for norm in (nn.LayerNorm, nn.RMSNorm)),
    *(Layer(glob, (), by_default=False) for glob in ("*Norm", "*Norm[123]d", "*LayerScale*")),
    Layer("transformers.pytorch_utils.Conv1D", _WEIGHT_AND_BIAS, units_dim=1),
    Layer(
        "transformers.models.*Experts",
        [*_PROJECTIONS, *(f"{name}_bias" for name in _PROJECTIONS), "weight"],
        units_dim=lambda experts: 2 if getattr(experts, "is_transposed", False) else 1,
    ),
    Layer("transformers.models.*Top[Kk]Router", _WEIGHT_AND_BIAS),
    Layer("transformers.models.*.DbrxExpertGLU", ("w1", "v1", "w2")),
    Layer("transformers.models.*.XLNetRelativeAttention", ("q", "k", "v", "o", "r")),
]
