"""How a module becomes Bayesian in place, and plain again."""

__all__ = ["NewPosterior", "become_aware", "become_bayesian", "become_plain"]

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..draws.companions import INITIAL_STD, PRIOR_MEAN
from .bayesian_class import enter_class, plain_class, remove_companions
from .computed_weights import compute, computed_weights, parametrizations
from .parameters import BayesianParameter
from .settings import PosteriorState, Settings, Slot, slots_of


@dataclass(frozen=True)
class NewPosterior:
    """What is to stand beside a parameter that becomes Bayesian: in each place that holds it, if it is tied.

    Attributes:
        settings: How it is Bayesian.
        companions: What its posterior keeps beside the mean, by the ending of the name.
        prior_mean: None for a prior that is not centred on the pretrained weights.
        initial_std: None for a prior that does not look at it.
        state: What may change, which the places share.
    """

    settings: Settings
    companions: Mapping[str, nn.Parameter]
    prior_mean: nn.Parameter | None
    initial_std: Tensor | None
    state: PosteriorState = field(default_factory=PosteriorState)


def become_bayesian(module: nn.Module, posteriors: Mapping[str, NewPosterior]) -> None:
    """Make parameters of ``module`` Bayesian in place, by attribute; each stays where it is, as the posterior mean."""
    enter_class(module, slots_of(module) | {name: Slot(new.settings, new.state) for name, new in posteriors.items()})
    # Past `register_parameter`: the module may have one of its own, which need not hear of these.
    for name, new in posteriors.items():
        for ending, companion in new.companions.items():
            module._parameters[name + ending] = companion
        if new.prior_mean is not None:
            module._parameters[name + PRIOR_MEAN] = new.prior_mean
        if new.initial_std is not None:
            module._buffers[name + INITIAL_STD] = new.initial_std


def become_aware(module: nn.Module) -> None:
    """Let a module that computes its weights from the Bayesian parameters of its children do so at each read.

    That is what a parametrized layer does. Any other module is left as it is.
    """
    if computed_weights(module, slots_of(module)):
        enter_class(module, slots_of(module))


def become_plain(module: nn.Module) -> None:
    """Undo :func:`become_bayesian` and :func:`become_aware` in place: the class and the parameters that it had."""
    computed = computed_weights(module, slots_of(module))
    for attribute, slot in slots_of(module).items():
        if slot.state.has_pruned:  # an optimizer's momentum may have moved the mean since
            parameter = BayesianParameter(attribute, module, attribute)
            parameter.mean.data.copy_(parameter.kept_mean)
        remove_companions(module, attribute)
    del module.__dict__["_bayesian"]
    object.__setattr__(module, "__class__", plain_class(type(module)))
    for weight in computed:
        if weight not in parametrizations(module):
            module.__dict__[weight] = compute(module, weight).detach()
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()
