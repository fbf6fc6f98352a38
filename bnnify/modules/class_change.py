"""Changes of a module's class in place: from plain to Bayesian, and back."""

__all__ = ["NewPosterior", "become_bayesian", "become_plain", "recompute_on_read"]

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..draws.companions import INITIAL_STD
from ..torch_internals import init_flat_weights
from .bayesian_class import enter_class, remove_companions
from .computed_weights import compute, computed_weights, parametrizations
from .parameters import BayesianParameter
from .settings import PosteriorState, Settings, Slot, plain_class, slots_of


@dataclass(frozen=True)
class NewPosterior:
    """The posterior of a parameter that is to become Bayesian; in each place that holds it, if it is tied.

    Attributes:
        companions: The tensors that the posterior keeps beside the mean, by the ending of the name.
        of_prior: The tensors that the prior keeps beside the mean, by the ending of the name.
        initial_std: None for a prior that does not look at it.
        state: What may change later; the places share it.
    """

    settings: Settings
    companions: dict[str, nn.Parameter]
    of_prior: dict[str, nn.Parameter]
    initial_std: Tensor | None
    state: PosteriorState = field(default_factory=PosteriorState)


def become_bayesian(module: nn.Module, posteriors: Mapping[str, NewPosterior]) -> None:
    """Make parameters of ``module`` Bayesian in place, by attribute; each stays where it is, as the posterior mean."""
    enter_class(module, slots_of(module) | {name: Slot(new.settings, new.state) for name, new in posteriors.items()})
    # Past `register_parameter`: the module may have one of its own, which need not hear of these.
    for name, new in posteriors.items():
        for ending, companion in (new.companions | new.of_prior).items():
            module._parameters[name + ending] = companion
        if new.initial_std is not None:
            module._buffers[name + INITIAL_STD] = new.initial_std


def recompute_on_read(module: nn.Module) -> None:
    """Make a parametrized layer whose children hold Bayesian parameters compute its weights at each read.

    Any other module is left as it is.
    """
    if computed_weights(module, slots_of(module)):
        enter_class(module, slots_of(module))


def become_plain(module: nn.Module) -> None:
    """Undo :func:`become_bayesian` and :func:`recompute_on_read` in place: the class and the parameters that it had."""
    computed = computed_weights(module, slots_of(module))
    for attribute, slot in slots_of(module).items():
        if slot.state.has_pruned:  # an optimizer's momentum may have moved the mean since
            parameter = BayesianParameter(attribute, module, attribute)
            parameter.mean.data.copy_(parameter.kept_mean)
        remove_companions(module, attribute)
    del module.__dict__["_bayesian"]
    object.__setattr__(module, "__class__", plain_class(module))
    for weight in computed:
        if weight not in parametrizations(module):
            module.__dict__[weight] = compute(module, weight).detach()
    if isinstance(module, nn.RNNBase):
        init_flat_weights(module)
