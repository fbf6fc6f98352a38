"""Bayesian parameters: their places in a model, and their posterior as it is now."""

__all__ = [
    "BayesianParameter",
    "bayesian_parameters",
    "companions_of",
    "is_derived",
    "noisy_parameters",
    "refuse_fsdp1",
    "unique_bayesian_parameters",
]

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..distributions.gaussian import is_pruned, rms_std
from ..distributions.prior import Prior
from ..draws.companions import INITIAL_STD, OF_PRIOR, PRIOR_MEAN, PRIOR_STD, RHO, as_buffer
from ..draws.processes import num_ranks, together
from ..draws.sharding import is_sharding, ranks_together, reshard, whole
from ..draws.slot import Active, has_draw, read
from ..errors import DrawError
from ..torch_internals import fsdp_mesh_ndim, is_fsdp_module
from .mean_field import MeanField
from .posterior import PosteriorFamily
from .settings import Settings, Slot, slots_of


@dataclass(frozen=True)
class BayesianParameter:
    """One Bayesian parameter of a converted model, looked at where it stands now.

    Attributes:
        name: The qualified name, such as ``layer1.0.conv1.weight``.
        module: The module that holds it.
        attribute: Its name there, such as ``weight``.
    """

    name: str
    module: nn.Module
    attribute: str

    @property
    def slot(self) -> Slot:
        return slots_of(self.module)[self.attribute]

    @property
    def settings(self) -> Settings:
        return self.slot.settings

    @property
    def posterior(self) -> PosteriorFamily:
        return self.slot.settings.posterior

    @property
    def prior(self) -> Prior:
        return self.slot.settings.prior

    @property
    def active(self) -> Active:
        return self.slot.active

    @property
    def has_pruned(self) -> bool:
        """True if some of its weights were pruned."""
        return self.slot.state.has_pruned

    @property
    def mean(self) -> Tensor:
        """The posterior mean: the parameter itself, whatever draw is in effect."""
        return cast(Tensor, self.module._parameters[self.attribute])

    def companion(self, ending: str) -> Tensor:
        """Return the parameter beside it whose name is its own and ``ending``."""
        return cast(Tensor, self.module._parameters[self.attribute + ending])

    @property
    def companions(self) -> dict[str, Tensor]:
        """The tensors beside the mean, by the ending of the name: ``{"_rho": ρ}`` of MeanField, ``{}`` of Point."""
        return {ending: self.companion(ending) for ending in self.posterior.companions}

    @property
    def rho(self) -> Tensor:
        """ρ of a mean-field posterior, whose standard deviation is softplus(ρ)."""
        return self.companion(RHO)

    @property
    def has_rho(self) -> bool:
        """True if the weights are independent N(μ, softplus(ρ)²): σ can be looked at, scaled and pruned by."""
        return isinstance(self.posterior, MeanField)

    @property
    def kept_mean(self) -> Tensor:
        """The posterior mean with a zero for each weight that was pruned, to which no gradient flows."""
        return self.mean.masked_fill(is_pruned(self.rho), 0.0) if self.has_pruned else self.mean

    @property
    def prior_mean(self) -> Tensor | None:
        """The pretrained weights, for a prior that is centred on them; None otherwise."""
        return self.module._parameters.get(self.attribute + PRIOR_MEAN)

    @property
    def prior_std(self) -> Tensor | None:
        """The std of the prior of each weight, for a prior that is elementwise; None otherwise."""
        return self.module._parameters.get(self.attribute + PRIOR_STD)

    @property
    def of_prior(self) -> dict[str, Tensor]:
        """The tensors that the prior keeps beside the mean, which nothing trains, by the ending of the name."""
        found = {ending: self.module._parameters.get(self.attribute + ending) for ending in OF_PRIOR}
        return {ending: tensor for ending, tensor in found.items() if tensor is not None}

    @property
    def initial_std(self) -> Tensor | None:
        """The root mean square of the σ that the posterior started with, of shape (1,), if the prior asks for it."""
        return self.module._buffers.get(self.attribute + INITIAL_STD)

    @property
    def prior_centre(self) -> Tensor:
        """The weights by whose size the scale of the prior went: its mean or, where it has none, that of q(w)."""
        return self.mean if self.prior_mean is None else self.prior_mean

    def initial_std_by_rule(self) -> Tensor:
        """Compute what the initial σ is by its rule, for the weights at the centre of the prior, of shape (1,)."""
        weights = self.prior_centre
        return as_buffer(rms_std(self.settings.initial_std(self.name, weights), weights.dtype))

    @torch.no_grad()
    def refresh_initial_std(self, assign: bool = False) -> None:
        """Recompute the initial σ, the scale of a prior, for pretrained weights that were loaded just now.

        With ``assign`` a new buffer takes the place of the present one, which keeps its value.
        """
        if self.initial_std is None:
            return
        known = self.initial_std_by_rule()
        if assign or self.initial_std.is_meta:
            self.module._buffers[self.attribute + INITIAL_STD] = known
        else:
            self.initial_std.copy_(known)

    def sample(self) -> Tensor:
        """Draw a reparameterized sample, from which gradients flow to the mean and to the tensors beside it."""
        return self.posterior.sample(self)

    def drawn(self) -> Tensor:
        """Return the sample of the draw in effect, or else a fresh one."""
        return read(self.active, self.mean) if has_draw(self.active) else self.sample()

    def kl(self) -> Tensor:
        """KL(q‖p) of this parameter in nats, summed over its elements; if by Monte Carlo, on the draw in effect.

        For a point posterior it is -log p(w), and weights that were pruned do not count.

        Raises:
            ConversionError: The prior does not give one number for each weight.
        """
        return whole(self.posterior.kl(self))  # of a sharded parameter every rank has computed its part of the sum

    def sample_and_kl(self) -> tuple[Tensor, Tensor] | None:
        """Compute a sample and :meth:`kl` at it in one pass; None where each has to be computed by itself."""
        return self.posterior.sample_and_kl(self)


def bayesian_parameters(root: nn.Module) -> Iterator[BayesianParameter]:
    """Yield every Bayesian parameter under ``root``, a tied one once for each module that holds it.

    Where FSDP2 has sharded a module under ``root``, it is the sharded parameter.

    Raises:
        DrawError: A module was changed after its conversion in a way that took the parameter out of its hands.
    """
    # Compiled code draws from torch's own generators, which ask nobody.
    several = not torch.compiler.is_compiling() and num_ranks() > 1
    groups: list[Any] = []
    first, of_fsdp = None, 0
    for module_name, module in root.named_modules():
        if is_sharding(module):
            reshard(module)
            of_fsdp = fsdp_mesh_ndim(module)
        if several and first is None:
            groups, first = ranks_together(module, of_fsdp)
        for attribute, slot in slots_of(module).items():
            mean = module._parameters.get(attribute)
            if mean is None and attribute in module._parameters:
                continue  # a bias that was set to None
            parameter = BayesianParameter(f"{module_name}.{attribute}".removeprefix("."), module, attribute)
            posterior = slot.settings.posterior
            companions = [module._parameters.get(attribute + ending) for ending in posterior.companions]
            there = [companion for companion in companions if companion is not None]
            if mean is None or len(there) < len(companions) or not posterior.fits(mean, *there):
                _refuse_surgery(parameter)
            yield parameter
    if several:
        together.groups, together.first = groups, first


def unique_bayesian_parameters(root: nn.Module) -> Iterator[BayesianParameter]:
    """Yield every Bayesian parameter under ``root`` once, under the first of its names."""
    seen = set()
    for parameter in bayesian_parameters(root):
        if id(parameter.mean) not in seen:
            seen.add(id(parameter.mean))
            yield parameter


def noisy_parameters(root: nn.Module) -> list[BayesianParameter]:
    """List those whose posterior has noise, each once."""
    return [parameter for parameter in unique_bayesian_parameters(root) if parameter.posterior.has_noise]


def is_derived(module: nn.Module, attribute: str) -> bool:
    """Tell whether this parameter of ``module`` belongs to the posterior or the prior of another one."""
    return any(
        attribute == name + ending for name, slot in slots_of(module).items() for ending in companions_of(slot.settings)
    )


def companions_of(settings: Settings) -> tuple[str, ...]:
    """List the endings of the names of all tensors that may stand beside a parameter with these settings."""
    return (*settings.posterior.companions, *OF_PRIOR, INITIAL_STD)


def refuse_fsdp1(module: nn.Module, attribute: str) -> None:
    """Raise a DrawError if FSDP1 has taken a parameter out of ``module``; FSDP2 leaves each in its place."""
    if is_fsdp_module(module):
        raise DrawError(
            f"FullyShardedDataParallel (FSDP1) has put `{attribute}` of a {type(module).__name__} into a flat "
            "parameter, which no draw can read. Shard with FSDP2 instead: torch.distributed.fsdp.fully_shard, on the "
            "layers of bnn.module and then on itself."
        )


def _refuse_surgery(parameter: BayesianParameter) -> None:
    refuse_fsdp1(parameter.module, parameter.attribute)
    parameters, attribute = parameter.module._parameters, parameter.attribute
    mean = parameters.get(attribute)
    gone = [ending for ending in parameter.posterior.companions if parameters.get(attribute + ending) is None]
    if mean is None:
        found = "it is no longer a parameter of its module"
    elif gone:
        found = f"its {gone[0].removeprefix('_')} is no longer a parameter of its module"
    else:
        others = " and ".join(
            f"that of its {ending.removeprefix('_')} is {tuple(companion.shape)}"
            for ending, companion in parameter.companions.items()
        )
        found = f"its shape is now {tuple(mean.shape)} but {others}"
    raise DrawError(
        f"Cannot sample `{parameter.name}` ({type(parameter.module).__name__}): {found}. The module was changed after "
        "its conversion (torch's pruning, weight norm, a parametrization, resizing?). "
        "Call bnnify.collapse first, change the model, and convert it again."
    )
