"""The content of one of bnnify's own files: tensors, how they are Bayesian, and where they came from."""

__all__ = ["Origin", "PosteriorFile"]

import copy
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..decisions import Decision
from ..distributions.gaussian import has_pruned
from ..draws.companions import INITIAL_STD, OF_PRIOR, PRIOR_MEAN, RHO, PriorMean
from ..model import BayesianModel
from ..modules.class_change import NewPosterior, become_bayesian
from ..modules.parameters import companions_of
from ..modules.settings import PosteriorState, Settings
from .architectures.lora_adapter import describe_adapter
from .architectures.recipe import Recipe
from .foreign.layout import Layout, place_of


@dataclass(frozen=True)
class Origin:
    """The file that the weights of a converted model came from, so that one of the same kind can be given back.

    Attributes:
        recipe: How to make the model again; None where only its author can.
        config: The ``config.json`` of a Hugging Face model, from which transformers makes it.
        layout: How the file was laid out that held the weights.
        rest: What else that file held, such as the state of an optimizer.
        notes: What the user should know of how the file was read; not written to files.
        adapter: The ``adapter_config.json`` of the LoRA adapter that is on the Hugging Face model.
    """

    recipe: Recipe | None = None
    config: Mapping[str, Any] | None = None
    layout: Layout | None = None
    rest: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    adapter: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        if self.adapter is not None:
            return f"LoRA adapter on {describe_adapter(self.adapter)}"
        return "" if self.recipe is None else str(self.recipe)


@dataclass(frozen=True)
class PosteriorFile:
    """The content of a file of bnnify's.

    Attributes:
        state_dict: The original names plus ``*_rho``, ``*_prior_mean``, ``*_prior_std`` and ``*_initial_std``.
        settings: How each Bayesian parameter is Bayesian, by name.
        origin: Where the weights came from.
        int8: The dtypes of the weights that stand there in int8, and the errors that it makes, by name; see
            :func:`~bnnify.checkpoints.int8.pack`. Empty for other files.
        history: What the command did with the model, the oldest first.
        decisions: What was fitted for its predictions, by name.
    """

    path: str | os.PathLike[str]
    state_dict: dict[str, Tensor]
    settings: dict[str, Settings]
    origin: Origin
    int8: Mapping[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    decisions: dict[str, Decision] = field(default_factory=dict)

    @property
    def dtype(self) -> str | None:
        """The dtype of the file if it is not that of the model: ``"int8"`` or None."""
        return "int8" if self.int8 else None

    @property
    def precision(self) -> str:
        """The errors of a file in int8, the largest and the rms of the worst tensor; empty for other files."""
        worst = {
            key: [max(errors) for errors in zip(*found, strict=True)]
            for key in ("mean_error", "std_error")
            if (found := [entry[key] for entry in self.int8.values() if key in entry])
        }
        units = {"mean_error": "of μ, in units of its rms,", "std_error": "of σ"}
        told = (f"{units[key]} {largest:.2g} (rms {rms:.2g})" for key, (largest, rms) in worst.items())
        return f"int8, error {', '.join(told)}" if worst else ""

    @property
    def plain_state_dict(self) -> dict[str, Tensor]:
        """Return the posterior means and everything that is not Bayesian, under the original names."""
        derived = {name + ending for name, each in self.settings.items() for ending in companions_of(each)}
        plain = copy.copy(self.state_dict)  # unlike a new dict, with what torch notes about the versions of the modules
        for name in derived & plain.keys():
            del plain[name]
        return plain

    def parameters_alone(self) -> BayesianModel:
        """Make modules without a forward that hold the Bayesian parameters, for what needs no architecture.

        They share their values with :attr:`state_dict`: pruning the one prunes the other. A prior mean that shares its
        memory with the mean, as in a file that the command wrote, is copied there.
        """
        root, shared = nn.Module(), dict[tuple[Any, ...], nn.Parameter]()
        for name in self.settings:
            prior_mean = self.state_dict.get(name + PRIOR_MEAN)
            if prior_mean is not None and place_of(prior_mean) == place_of(self.state_dict[name]):
                self.state_dict[name + PRIOR_MEAN] = prior_mean.clone()

        def parameter(name: str) -> nn.Parameter | None:
            tensor = self.state_dict.get(name)
            if tensor is None:
                return None
            return shared.setdefault(place_of(tensor) or (name,), nn.Parameter(tensor, requires_grad=False))

        posteriors: dict[nn.Module, dict[str, NewPosterior]] = {}
        for name, settings in self.settings.items():
            path, _, attribute = name.rpartition(".")
            module = _submodule(root, path)
            module.register_parameter(attribute, parameter(name))
            found = {ending: parameter(name + ending) for ending in settings.posterior.companions}
            companions = {ending: value for ending, value in found.items() if value is not None}
            of_prior = {ending: parameter(name + ending) for ending in OF_PRIOR}
            initial_std = self.state_dict.get(name + INITIAL_STD, torch.tensor([math.nan], device="cpu"))
            posteriors.setdefault(module, {})[attribute] = NewPosterior(
                settings,
                companions,
                {ending: PriorMean(value.data) for ending, value in of_prior.items() if value is not None},
                initial_std if settings.prior.needs_initial_std else None,
                PosteriorState(RHO in companions and has_pruned(companions[RHO])),
            )
        for module, new in posteriors.items():
            become_bayesian(module, new)
        return BayesianModel(root)


def _submodule(root: nn.Module, path: str) -> nn.Module:
    """Return the submodule of ``root`` at a dotted path, which is made of empty modules where it is not there."""
    module = root
    for part in path.split(".") if path else ():
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    return module
