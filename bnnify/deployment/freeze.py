"""Freezing: a fixed number of networks from the posterior as one plain module."""

__all__ = ["Ensemble", "freeze"]

import copy
from typing import Any

from torch import Tensor, nn

from ..checks import check_num_samples
from ..convert import collapse
from ..model import BayesianModel, stacked
from ..modules.parameters import unique_bayesian_parameters
from ..prediction.sampler import Sampler


class Ensemble(nn.Module):
    """Networks that are alike, of which the forward returns all outputs.

    Attributes:
        networks: The networks.
    """

    def __init__(self, networks: list[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The networks' output structure, in which each tensor of shape ``(...)`` has become ``(K, ...)``."""
        return stacked([network(*args, **kwargs) for network in self.networks])


def freeze(bnn: nn.Module, num_samples: int, *, antithetic: bool = False) -> Ensemble:
    """Draw ``num_samples`` networks once, and give them back as one plain module, which draws nothing any more.

    They are the networks that ``bnn.sample`` draws under the same seed, and the outputs are stacked as there.
    ``torch.export``, ``torch.compile``, ``pickle`` and ``state_dict`` take the module as any other. The drawn weights
    are frozen; all else (deterministic parameters, buffers) is a single copy, which the networks share.

    Args:
        bnn: A converted model, which stays as it is.
        num_samples: K, the number of networks.
        antithetic: Draw them in pairs with the noise ε and -ε, as in :func:`~bnnify.prediction.predict`. Default:
            ``False``.

    Raises:
        ArgumentError: ``num_samples`` is not positive.

    Example::

        >>> ensemble = bnnify.freeze(bnnify.convert(nn.Linear(3, 2)), num_samples=5)
        >>> ensemble(torch.ones(4, 3)).shape
        torch.Size([5, 4, 2])
    """
    check_num_samples(num_samples)
    root = bnn.module if isinstance(bnn, BayesianModel) else bnn
    plain = collapse(root)
    names = {p.name: id(p.mean) for p in unique_bayesian_parameters(root) if not p.is_point}
    means = {name: plain.get_parameter(name) for name in names}
    noisy = {id(mean) for mean in means.values()}
    shared = {id(tensor): tensor for tensor in [*plain.parameters(), *plain.buffers()] if id(tensor) not in noisy}
    sampler = Sampler(root, antithetic=antithetic)
    networks = []
    for number in range(num_samples):
        sampler.draw(number)
        drawn = {id(means[name]): _frozen(sampler.samples[mean]) for name, mean in names.items()}
        networks.append(copy.deepcopy(plain, shared | drawn))
    ensemble = Ensemble(networks)
    ensemble.training = bnn.training  # train() would set the flag of every module
    return ensemble


def _frozen(drawn: Tensor) -> nn.Parameter:
    return nn.Parameter(drawn.detach().clone(), requires_grad=False)
