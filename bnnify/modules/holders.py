"""The places of a model where its parameters stand."""

__all__ = ["Holder", "holders_by_parameter"]

from dataclasses import dataclass

from torch import Tensor, nn
from torch.fx import GraphModule

from .computed_weights import parametrizations, target_of
from .exported_programs import operator_weights


@dataclass(frozen=True)
class Holder:
    """A place where a parameter stands: a module, under all of its names, and the attribute there.

    Attributes:
        layer: The layer that uses the parameter: the module, or the parametrized layer whose weight it computes.
        weight: The weight of that layer which the parameter is, or from which it is computed.
        is_operator_weight: True if an operator of an exported program takes the parameter as its weight; None outside
            of such programs.
        may_be_layer: True if the module may be a layer: no module in it has parameters, and it is not part of a
            parametrization.
    """

    module_names: tuple[str, ...]
    module: nn.Module
    attribute: str
    layer: nn.Module
    weight: str
    is_operator_weight: bool | None = None
    may_be_layer: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """The qualified names of the parameter here, such as ``fc.weight``."""
        return tuple(f"{name}.{self.attribute}" if name else self.attribute for name in self.module_names)

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The qualified names of the layer."""
        if self.layer is self.module:
            return self.module_names
        return tuple(name.removesuffix(f"parametrizations.{self.weight}").rstrip(".") for name in self.module_names)


def holders_by_parameter(model: nn.Module) -> dict[Tensor, list[Holder]]:
    """Find each parameter of ``model`` with every place that holds it, which are several if it is tied."""
    module_names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        module_names.setdefault(module, []).append(name)
    parametrized: dict[nn.Module, tuple[nn.Module, str]] = {
        made: (module, weight) for module in module_names for weight, made in parametrizations(module).items()
    }
    parts = {part for made in parametrized for part in made.children()}
    graphs = [module for module in module_names if isinstance(module, GraphModule)]
    of_operators = {parameter for graph in graphs for parameter in operator_weights(graph)}
    in_programs = {module for graph in graphs for module in graph.modules()}
    holders: dict[Tensor, list[Holder]] = {}
    for module, names in module_names.items():
        may_be_layer = module not in parts and not any(True for child in module.children() for _ in child.parameters())
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                layer, weight = parametrized.get(module) or (module, target_of(module, attribute))
                in_program = parameter in of_operators if module in in_programs else None
                place = Holder(tuple(names), module, attribute, layer, weight, in_program, may_be_layer)
                holders.setdefault(parameter, []).append(place)
    return holders
