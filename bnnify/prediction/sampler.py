"""The networks of a prediction: drawn one after another, each in the memory of the one before."""

__all__ = ["Sampler"]

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..distributions.gaussian import std
from ..draws.draw import Draw
from ..draws.noise import noise_like, standard_normal_
from ..draws.sample import sample
from ..draws.sharding import is_sharding
from ..modules.parameters import BayesianParameter, bayesian_parameters


class Sampler:
    """Draws networks for use without gradient.

    σ is computed once, and the samples of a network overwrite those of the network before, unless somebody still holds
    them.

    Args:
        root: The module whose Bayesian parameters are drawn. They must not change between two draws.
        antithetic: Let networks 2j and 2j + 1 have the noise ε and -ε. Default: ``False``.
        repeatable: Let counting from 0 once more give the same networks once more. Each network then has a random
            number generator of its own, seeded from that of the program, which is never set back: others use it too.
            Default: ``False``, the networks that ``bnn.draw()`` would draw.

    Attributes:
        samples: What was drawn last, by the identity of the posterior mean; point posteriors have none.
    """

    def __init__(self, root: nn.Module, *, antithetic: bool = False, repeatable: bool = False) -> None:
        self.samples: dict[int, Tensor] = {}
        self._root = root
        self._antithetic = antithetic
        self._repeatable = repeatable
        self._seeds: list[int] = []
        self._generators: dict[torch.device, torch.Generator] | None = None
        self._mirrored = False
        self._kept: dict[int, _Kept] = {}
        # FSDP puts others in their place with every forward.
        self._parameters = None if any(map(is_sharding, root.modules())) else list(bayesian_parameters(root))

    @property
    def parameters(self) -> list[BayesianParameter]:
        """The Bayesian parameters, in the order in which they are drawn."""
        return list(bayesian_parameters(self._root)) if self._parameters is None else self._parameters

    @torch.no_grad()
    def draw(self, number: int) -> Draw:
        """Network ``number``; they are drawn in order, from 0 on. Let go of the one before, to have its memory used."""
        self.samples.clear()
        self._mirrored = self._antithetic and number % 2 == 1
        if self._repeatable:
            if number == len(self._seeds):
                self._seeds.append(int(torch.randint(2**62, ())))
            self._generators = {}
            for device in {parameter.mean.device for parameter in self.parameters}:
                self._generators[device] = torch.Generator(device).manual_seed(self._seeds[number])
        return Draw(self.parameters, self._make)

    def generator_states(self) -> list[Tensor]:
        """The states of torch's random number generators, of the CPU and of the devices of the model."""
        devices = {tensor.device for tensor in self._root.parameters()} - {torch.device("cpu"), torch.device("meta")}
        return [torch.get_rng_state(), *(torch.get_device_module(each).get_rng_state(each) for each in devices)]

    def _make(self, parameter: BayesianParameter) -> Tensor:
        mean = parameter.mean
        if parameter.is_point:
            return mean
        kept = self._kept.get(id(mean))
        if kept is None:
            kept = self._kept[id(mean)] = _Kept(mean, parameter.kept_mean, std(parameter.rho))
        generator = self._generators[mean.device] if self._generators else None
        if kept.is_plain:
            made = kept.overwrite(self._antithetic, self._mirrored, generator)
        else:
            if not self._mirrored:
                kept.noise = noise_like(mean, generator)
            assert kept.noise is not None
            made = sample(parameter.kept_mean, parameter.rho, -kept.noise if self._mirrored else kept.noise)
        self.samples[id(mean)] = made
        return made


@dataclass
class _Kept:
    """What is kept of one parameter from draw to draw: its moments, and the memory of its sample and of its noise."""

    parameter: Tensor  # so that its identity stays its own
    mean: Tensor
    std: Tensor
    sample: Tensor | None = None
    noise: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether its sample can be made in place: not if it is sharded, of mixed dtypes, or seen by ``torch.func``."""
        return (
            all(type(tensor) in (Tensor, nn.Parameter) for tensor in (self.mean, self.std))
            and self.mean.dtype == self.std.dtype
            and torch._C._functorch.peek_interpreter_stack() is None
        )

    def overwrite(self, antithetic: bool, mirrored: bool, generator: torch.Generator | None) -> Tensor:
        if self.sample is None or _is_held(self.sample):
            self.sample = torch.empty_like(self.mean, requires_grad=False)
        if not antithetic:
            self.noise = self.sample  # one memory for both
        elif self.noise is None:
            self.noise = torch.empty_like(self.sample)
        assert self.noise is not None
        if not mirrored:
            standard_normal_(self.noise, generator)
        torch.addcmul(self.mean, self.std, self.noise, value=-1 if mirrored else 1, out=self.sample)
        return self.sample.detach()  # a tensor of its own, to which a layer may attach what it computes from it


def _is_held(tensor: Tensor) -> bool:
    """Whether another tensor, such as an output that is a weight, still uses this memory."""
    # One reference is that of the tensor, another one that of the storage that is asked here.
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) > 2
