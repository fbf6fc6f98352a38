"""The same network made Bayesian by bnnify and by the libraries beside it, behind one way of calling it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import bnnify

RHO = math.log(math.expm1(0.01))
"""σ = 0.01 to begin with, in every library that is told: the time does not depend on it."""


@dataclass
class Bayesian:
    """A network with a posterior over some of its weights.

    Attributes:
        model: The module, which holds all parameters.
        forward: From a batch to the output of one draw and to the KL as the library computes it; None for a network
            without a posterior.
        weights: How many weights have a posterior.
    """

    model: nn.Module
    forward: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    weights: int = 0


def deterministic(network: nn.Module, only: str | None = None) -> Bayesian:
    return Bayesian(network, lambda inputs: (network(inputs), None))


def converted(**settings: Any) -> Callable[..., Bayesian]:
    """bnnify with these settings of ``convert``."""

    def make(network: nn.Module, only: str | None = None) -> Bayesian:
        bnn = bnnify.convert(network, **{"select": only, **settings})
        return Bayesian(bnn, bnn, sum(entry.numel for entry in bnn.report.bayesian))

    return make


def linear_layers(name: str, module: nn.Module) -> bool:
    """What the other libraries find in a transformer; the attention they leave alone."""
    return type(module) is nn.Linear


def bayesian_torch(kind: str, delta: float = 0.2) -> Callable[..., Bayesian]:
    """bayesian-torch with layers of this kind, and σ of this share of each weight (MOPED).

    The layers are made by its own functions, one by one: `dnn_to_bnn` fails on the output projection of attention.
    """

    def make(network: nn.Module, only: str | None = None) -> Bayesian:
        from bayesian_torch.models.dnn_to_bnn import bnn_conv_layer, bnn_linear_layer, get_kl_loss

        settings = bayesian_torch_settings(kind, delta)

        def layer(plain: nn.Linear | nn.Conv2d) -> nn.Module:
            return (bnn_linear_layer if isinstance(plain, nn.Linear) else bnn_conv_layer)(settings, plain)

        model, weights = _replaced(network, layer, only)
        return Bayesian(model, lambda inputs: (model(inputs), get_kl_loss(model)), weights)

    return make


def bayesian_torch_settings(kind: str, delta: float = 0.2) -> dict[str, Any]:
    settings = {"prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0, "posterior_rho_init": RHO}
    return settings | {"type": kind, "moped_enable": True, "moped_delta": delta}


def torchbnn(network: nn.Module, only: str | None = None) -> Bayesian:
    from torchbnn import BayesConv2d, BayesLinear, BKLLoss

    def layer(plain: nn.Linear | nn.Conv2d) -> nn.Module:
        prior = {"prior_mu": 0.0, "prior_sigma": 0.1}
        made = (BayesLinear if isinstance(plain, nn.Linear) else BayesConv2d)(**prior, **_arguments(plain))
        made.weight_mu.data.copy_(plain.weight)
        made.weight_log_sigma.data.fill_(math.log(0.01))
        return made

    model, weights = _replaced(network, layer, only)
    kl = BKLLoss(reduction="sum")
    return Bayesian(model, lambda inputs: (model(inputs), kl(model).squeeze()), weights)


def blitz(network: nn.Module, only: str | None = None) -> Bayesian:
    from blitz.losses import kl_divergence_from_nn
    from blitz.modules import BayesianConv2d, BayesianLinear

    def layer(plain: nn.Linear | nn.Conv2d) -> nn.Module:
        kind = BayesianLinear if isinstance(plain, nn.Linear) else BayesianConv2d
        made = kind(**_arguments(plain), posterior_rho_init=RHO)
        # The layer draws from parameters of this object, which are others than its own `weight_mu` and `weight_rho`.
        made.weight_sampler.mu.data.copy_(plain.weight)
        return made

    model, weights = _replaced(network, layer, only)
    return Bayesian(model, lambda inputs: (model(inputs), kl_divergence_from_nn(model)), weights)


MAKERS: dict[str, Callable[..., Bayesian]] = {
    "deterministic": deterministic,
    "bnnify": converted(),
    "bnnify-gaussian": converted(prior=bnnify.Gaussian(std=0.1)),
    "bnnify-mixture": converted(prior=bnnify.ScaleMixture()),
    "bnnify-flipout": converted(estimator="flipout"),
    "bnnify-local": converted(estimator="local"),
    "bnnify-linear": converted(select=linear_layers),
    "bayesian-torch": bayesian_torch("Reparameterization"),
    "bayesian-torch-flipout": bayesian_torch("Flipout"),
    "torchbnn": torchbnn,
    "blitz": blitz,
}
"""By the names of the tables. A plain `bnnify` has the default settings of `convert`."""


def variant(
    name: str,
    network: nn.Module,
    device: str = "cpu",
    channels_last: bool = False,
    only: str | None = None,
    **settings: Any,
) -> Bayesian:
    """The variant of this name, of a copy of ``network``; with ``only`` just the layer of that name is Bayesian.

    With settings it is bnnify's ``convert`` that gets them.
    """
    maker = converted(**settings) if settings else MAKERS[name]
    made = maker(copy.deepcopy(network), only)
    channels_last = channels_last and name != "torchbnn"  # whose KL takes a `view` that this layout does not allow
    made.model.to(device, memory_format=torch.channels_last if channels_last else torch.preserve_format)
    return made


def average(model: nn.Module, inputs: Tensor, samples: int) -> Tensor:
    """Class probabilities as the documentation of the other libraries has them: of forwards, which are stacked."""
    return torch.stack([model(inputs) for _ in range(samples)]).softmax(-1).mean(0)


def parameter_groups(model: nn.Module, lr: float, rho_lr: float) -> list[dict[str, Any]]:
    """For an optimizer, with a learning rate of its own for what the standard deviations are made of."""
    if isinstance(model, bnnify.BayesianModel):
        return model.parameter_groups(lr=lr, rho_lr=rho_lr)
    named = list(model.named_parameters())
    rhos = [parameter for name, parameter in named if ".rho_" in name]  # as bayesian-torch names them
    others = [parameter for name, parameter in named if ".rho_" not in name]
    return [{"params": others, "lr": lr}, {"params": rhos, "lr": rho_lr}]


def _replaced(network: nn.Module, layer: Callable[[Any], nn.Module], only: str | None) -> tuple[nn.Module, int]:
    """The network with a layer of another library for every nn.Linear and nn.Conv2d, and how many weights they have.

    Attention and its output projection, which is a subclass of nn.Linear, none of the libraries can replace.
    """
    weights = 0
    for parent_name, parent in list(network.named_modules()):
        for name, plain in list(parent.named_children()):
            qualified = f"{parent_name}.{name}".lstrip(".")
            if type(plain) in (nn.Linear, nn.Conv2d) and only in (None, qualified):
                setattr(parent, name, layer(plain))
                weights += sum(parameter.numel() for parameter in plain.parameters())
    return network, weights


def _arguments(plain: nn.Linear | nn.Conv2d) -> dict[str, Any]:
    names = ("in_features", "out_features")
    if isinstance(plain, nn.Conv2d):
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    return {name: getattr(plain, name) for name in names} | {"bias": plain.bias is not None}
