"""Bayesian layers to build models from by hand: the converter's own classes, whose forward returns ``(output, kl)``."""

__all__ = [
    "Conv1dReparameterization",
    "Conv2dReparameterization",
    "Conv3dReparameterization",
    "ConvTranspose1dReparameterization",
    "ConvTranspose2dReparameterization",
    "ConvTranspose3dReparameterization",
    "LinearReparameterization",
]

import math
from typing import Any

import torch
from torch import Tensor, nn

from .distributions.gaussian import std
from .distributions.initial_std import Constant
from .distributions.priors import Gaussian
from .draws.companions import RHO
from .errors import check_positive
from .model import call_in_draw
from .modules.bayesian_class import bayesian_class
from .modules.settings import Settings, Slot

_BAYESIAN = ("weight", "bias")


class _Layer(nn.Module):
    """The base of all of them: its own initialisation, and a forward that draws and returns ``(output, kl)``."""

    def __init__(self, prior_mean: float, prior_variance: float, mu: float, rho: float, **layer: Any) -> None:
        """Build the torch layer that stands next in the method resolution order, and its posterior."""
        check_positive("prior_variance", prior_variance)
        prior = Gaussian(mean=prior_mean, std=math.sqrt(prior_variance))
        start = std(torch.tensor(rho, dtype=torch.float64, device="cpu")).item()
        # Before the torch layer's own __init__, which already reads its weight.
        self._bayesian = {name: Slot(Settings(prior, Constant(start))) for name in _BAYESIAN}
        super().__init__(**layer)
        for name in _BAYESIAN:
            mean = self._parameters[name]
            if mean is None:
                del self._bayesian[name]
                continue
            nn.init.normal_(mean, mu, 0.1)
            self.register_parameter(name + RHO, nn.Parameter(torch.empty_like(mean).normal_(rho, 0.1)))

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Apply the torch layer in one draw; return its output and the KL of weight and bias in nats, summed."""
        return call_in_draw(self, super().forward, *args, **kwargs)


class LinearReparameterization(_Layer, bayesian_class(nn.Linear, _BAYESIAN)):  # type: ignore[misc]
    """A Linear layer with a Gaussian posterior N(μ, softplus(ρ)²) over weight and bias.

    Each call is a draw of its own, unless a draw of the model around it is in effect.

    Args:
        in_features: As in :class:`torch.nn.Linear`.
        out_features: As in :class:`torch.nn.Linear`.
        prior_mean: Mean of the Gaussian prior. Default: ``0.0``.
        prior_variance: Its *variance* (bayesian-torch has an argument of this name that it uses as a standard
            deviation). Default: ``1.0``.
        posterior_mu_init: The means start as N(posterior_mu_init, 0.1²). Default: ``0.0``.
        posterior_rho_init: ρ starts as N(posterior_rho_init, 0.1²). Default: ``-3.0``.
        bias: Have a bias, Bayesian too. Default: ``True``.

    Shape:
        Input ``(*, in_features)``; returns an output ``(*, out_features)`` and the KL, a scalar in nats.

    Raises:
        ConversionError: ``prior_variance`` is not a positive, finite number.

    References:
        Blundell et al. 2015, "Weight Uncertainty in Neural Networks", section 3.2.

    Example::

        >>> output, kl = LinearReparameterization(4, 2, prior_variance=0.01)(torch.ones(3, 4))
        >>> output.shape, kl.shape
        (torch.Size([3, 2]), torch.Size([]))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        prior_mean: float = 0.0,
        prior_variance: float = 1.0,
        posterior_mu_init: float = 0.0,
        posterior_rho_init: float = -3.0,
        bias: bool = True,
        **layer: Any,
    ) -> None:
        layer |= {"in_features": in_features, "out_features": out_features, "bias": bias}
        super().__init__(prior_mean, prior_variance, posterior_mu_init, posterior_rho_init, **layer)


class _Conv(_Layer):
    """A (transposed) convolution with a Gaussian posterior N(μ, softplus(ρ)²) over weight and bias.

    ``in_channels`` to ``groups``, ``bias`` and the keywords ``padding_mode``, ``device`` and ``dtype`` are those of the
    torch layer, as are the shapes; the prior and the posterior are set as in :class:`LinearReparameterization`.
    ``forward``, of a transposed one with its ``output_size``, returns ``(output, kl)``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        prior_mean: float = 0.0,
        prior_variance: float = 1.0,
        posterior_mu_init: float = 0.0,
        posterior_rho_init: float = -3.0,
        bias: bool = True,
        **layer: Any,
    ) -> None:
        layer |= {"in_channels": in_channels, "out_channels": out_channels, "kernel_size": kernel_size}
        layer |= {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "bias": bias}
        super().__init__(prior_mean, prior_variance, posterior_mu_init, posterior_rho_init, **layer)


class _ConvTranspose(_Layer):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        output_padding: int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        prior_mean: float = 0.0,
        prior_variance: float = 1.0,
        posterior_mu_init: float = 0.0,
        posterior_rho_init: float = -3.0,
        bias: bool = True,
        **layer: Any,
    ) -> None:
        layer |= {"in_channels": in_channels, "out_channels": out_channels, "kernel_size": kernel_size}
        layer |= {"stride": stride, "padding": padding, "output_padding": output_padding}
        layer |= {"dilation": dilation, "groups": groups, "bias": bias}
        super().__init__(prior_mean, prior_variance, posterior_mu_init, posterior_rho_init, **layer)


class Conv1dReparameterization(_Conv, bayesian_class(nn.Conv1d, _BAYESIAN)):  # type: ignore[misc]
    __doc__ = _Conv.__doc__


class Conv2dReparameterization(_Conv, bayesian_class(nn.Conv2d, _BAYESIAN)):  # type: ignore[misc]
    __doc__ = _Conv.__doc__


class Conv3dReparameterization(_Conv, bayesian_class(nn.Conv3d, _BAYESIAN)):  # type: ignore[misc]
    __doc__ = _Conv.__doc__


class ConvTranspose1dReparameterization(_ConvTranspose, bayesian_class(nn.ConvTranspose1d, _BAYESIAN)):  # type: ignore[misc]
    __doc__ = _Conv.__doc__


class ConvTranspose2dReparameterization(_ConvTranspose, bayesian_class(nn.ConvTranspose2d, _BAYESIAN)):  # type: ignore[misc]
    __doc__ = _Conv.__doc__


class ConvTranspose3dReparameterization(_ConvTranspose, bayesian_class(nn.ConvTranspose3d, _BAYESIAN)):  # type: ignore[misc]
    __doc__ = _Conv.__doc__
