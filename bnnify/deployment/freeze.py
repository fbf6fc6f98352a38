"""Freeze a fixed number of networks from the posterior into one plain module."""

__all__ = ["Ensemble", "freeze"]

import copy
from typing import Any

from torch import nn

from ..convert import collapse
from ..errors import check_num_samples
from ..model import BayesianModel, stacked
from ..modules.parameters import noisy_parameters
from ..prediction.batches import as_arguments
from ..prediction.sampler import Sampler
from .ensemble_graph import EnsembleGraph
from .trace import BATCH, Output


class Ensemble(nn.Module):
    """Networks of one architecture; the forward stacks their outputs.

    Attributes:
        networks: The K networks, an ``nn.ModuleList``.
    """

    def __init__(self, networks: list[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call every network; in the output each tensor of shape ``(...)`` has become ``(K, ...)``."""
        return stacked([network(*args, **kwargs) for network in self.networks])

    def as_graph(self, example_inputs: Any, *, output: Output = None, dynamic_shapes: Any = BATCH) -> EnsembleGraph:
        """Make one graph of the networks in eval mode, which runs what does not depend on the sample once.

        It shares the weights with the networks and gives the same outputs, by the same operations.

        Args:
            example_inputs: What the networks are called with: a tensor, a tuple of arguments, or a mapping of keyword
                arguments. The graph is called in the same way. A batch of one fixes the size of the batch.
            output: Which part of their output, as in :func:`~bnnify.prediction.predict`. Default: all of it.
            dynamic_shapes: Which dimensions may have another size than in the example: ``"batch"``, the first one as
                far as the model allows it, or what ``torch.export.export`` takes. Default: ``"batch"``.

        Raises:
            ArgumentTypeError: The networks cannot be called with this.
            ExportError: ``torch.export`` does not take a network, or it draws random numbers in eval mode.

        Example::

            >>> bnn = bnnify.convert(nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 2)), select="1.*")
            >>> graph = bnnify.freeze(bnn, num_samples=5).as_graph(torch.ones(4, 3))
            >>> graph(torch.ones(6, 3)).shape
            torch.Size([5, 6, 2])
        """
        return EnsembleGraph([*self.networks], as_arguments(example_inputs), output, dynamic_shapes)


def freeze(bnn: nn.Module, num_samples: int, *, antithetic: bool = False) -> Ensemble:
    """Draw ``num_samples`` networks once, as one plain module that draws nothing any more.

    They are the networks that ``bnn.sample`` draws under the same seed, and the outputs are stacked as there.
    ``torch.export``, ``torch.compile``, ``pickle`` and ``state_dict`` take the module as any other. The drawn weights
    are frozen; deterministic parameters and buffers are a single copy, which the networks share.

    Args:
        bnn: A converted model, which stays as it is.
        num_samples: K, the number of networks.
        antithetic: Draw them in pairs with the noise ε and -ε, as in :func:`~bnnify.prediction.predict`. Default:
            ``False``.

    Raises:
        ArgumentError: ``num_samples`` is not positive.
        ConversionError: FSDP2 shards a Bayesian parameter, or the model cannot be copied.

    Example::

        >>> ensemble = bnnify.freeze(bnnify.convert(nn.Linear(3, 2)), num_samples=5)
        >>> ensemble(torch.ones(4, 3)).shape
        torch.Size([5, 4, 2])
    """
    check_num_samples(num_samples)
    root = bnn.module if isinstance(bnn, BayesianModel) else bnn
    plain = collapse(root)
    names = {p.name: id(p.mean) for p in noisy_parameters(root)}
    means = {name: plain.get_parameter(name) for name in names}
    noisy = {id(mean) for mean in means.values()}
    shared = {id(tensor): tensor for tensor in [*plain.parameters(), *plain.buffers()] if id(tensor) not in noisy}
    sampler = Sampler(root, antithetic=antithetic)
    networks = []
    for number in range(num_samples):
        sampler.draw(number)
        samples = {id(means[name]): sampler.samples[mean].detach().clone() for name, mean in names.items()}
        frozen = {mean: nn.Parameter(sample, requires_grad=False) for mean, sample in samples.items()}
        networks.append(copy.deepcopy(plain, shared | frozen))
    ensemble = Ensemble(networks)
    ensemble.training = bnn.training  # train() would set the flag of every module
    return ensemble
