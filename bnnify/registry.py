"""Which parameters of which layers are their weights: what ``convert`` takes, and what a user may add to it."""

__all__ = ["Layer", "layer_of", "register_layer"]

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import nn

from .errors import ConversionError

Names: TypeAlias = Sequence[str] | Callable[[Any], Sequence[str]]


@dataclass(frozen=True)
class Layer:
    """A type of layer, the parameters in it that are its weights, and whether they are converted unasked.

    Attributes:
        type: The class, or a glob of the class's qualified name for one whose library need not be installed.
        names: The names of the parameters, or a function that gives them for an instance.
        by_default: Whether ``convert`` takes them without a ``select``.
    """

    type: type[nn.Module] | str
    names: Names
    by_default: bool = True

    def describes(self, module: nn.Module) -> bool:
        """Whether ``module`` is of this type or of a subclass."""
        if not isinstance(self.type, str):
            return isinstance(module, self.type)
        return any(fnmatchcase(f"{cls.__module__}.{cls.__qualname__}", self.type) for cls in type(module).__mro__)

    def names_in(self, module: nn.Module) -> Sequence[str]:
        """The names of the weights of ``module``, of which it may lack some."""
        return self.names(module) if callable(self.names) else self.names


def register_layer(layer: type[nn.Module] | str, parameters: Names, *, by_default: bool = True) -> None:
    """Teach :func:`bnnify.convert` which parameters of a layer type are its weights.

    Nothing else needs to be known of the layer: whatever reads one of these parameters during a draw gets its sample.
    Of several registered types that a layer is an instance of, the one registered last holds; so a type that is
    registered again, or a subclass of a known one, gets the new parameters.

    Args:
        layer: The class, subclasses included, or a glob of its qualified name, such as ``"mylib.layers.*Conv"``.
        parameters: The names of the parameters, or a function that gives them for an instance. A name that an instance
            lacks, or that is None there, is passed over.
        by_default: Convert them even where no ``select`` is given. Default: ``True``.

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
    if isinstance(parameters, str) or not (callable(parameters) or all(isinstance(name, str) for name in parameters)):
        raise ConversionError(f"Cannot register {layer!r}: give a list of names of parameters, not {parameters!r}.")
    _LAYERS.insert(0, Layer(layer, parameters, by_default))


def layer_of(module: nn.Module) -> Layer | None:
    """What is known of the type of ``module``."""
    return next((layer for layer in _LAYERS if layer.describes(module)), None)


_WEIGHT_AND_BIAS = ("weight", "bias")

_LAYERS = [
    Layer(nn.Linear, _WEIGHT_AND_BIAS),
    Layer(nn.modules.conv._ConvNd, _WEIGHT_AND_BIAS),
    Layer(nn.Bilinear, _WEIGHT_AND_BIAS),
    Layer(
        nn.MultiheadAttention,
        ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"),
    ),
    Layer(nn.RNNBase, lambda layer: layer._flat_weights_names),
    Layer(nn.RNNCellBase, ("weight_ih", "weight_hh", "bias_ih", "bias_hh")),
    Layer(nn.Embedding, ("weight",), by_default=False),
    Layer(nn.EmbeddingBag, ("weight",), by_default=False),
    Layer("transformers.pytorch_utils.Conv1D", _WEIGHT_AND_BIAS),
]
