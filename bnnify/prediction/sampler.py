"""Networks drawn one after another: the one way in which predict, sample, tune_std and freeze draw theirs."""

__all__ = ["Sampler", "mean_draw"]

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..distributions.gaussian import std
from ..draws.draw import Draw
from ..draws.noise import standard_normal_
from ..draws.processes import next_seed
from ..draws.sharding import is_sharding
from ..modules.parameters import BayesianParameter, bayesian_parameters
from ..torch_internals import in_transform, memory_is_shared


def mean_draw(root: nn.Module) -> Draw:
    """The draw whose network is the posterior mean, also inside another draw."""
    return Draw(list(bayesian_parameters(root)), lambda parameter: parameter.mean)


class Sampler:
    """Draw networks one after another.

    Without gradients σ is computed once, and the samples of a network overwrite those of the network before, unless
    somebody still holds them.

    Args:
        root: The module whose Bayesian parameters are drawn. They must not change between two draws.
        gradients: Let gradients flow to means and ρ; each network then has memory of its own. Default: ``False``.
        antithetic: Let networks 2j and 2j + 1 have the noise ε and -ε; without gradients only. Default: ``False``.
        repeatable: Let counting from 0 once more give the same networks once more; without gradients only. Each network
            then has a random number generator of its own, seeded from that of the program, which is never set back:
            others use it too. Default: ``False``, the networks that ``bnn.draw()`` would draw.
        seed: Seed these generators from it, and leave that of the program alone. Default: ``None``.

    Attributes:
        samples: What was drawn last without gradients, by the identity of the posterior mean; point posteriors have
            none.
    """

    def __init__(
        self,
        root: nn.Module,
        *,
        gradients: bool = False,
        antithetic: bool = False,
        repeatable: bool = False,
        seed: int | None = None,
    ) -> None:
        self.samples: dict[int, Tensor] = {}
        self._root = root
        self._gradients = gradients
        self._antithetic = antithetic
        self._repeatable = repeatable or seed is not None
        self._source = None if seed is None else torch.Generator().manual_seed(seed)
        self._seeds: list[int] = []
        self._generators: dict[torch.device, torch.Generator] = {}
        self._mirrored = False
        self._kept: dict[int, _Kept] = {}
        # FSDP puts others in their place with every forward.
        self._parameters = None if any(map(is_sharding, root.modules())) else list(bayesian_parameters(root))

    @property
    def parameters(self) -> list[BayesianParameter]:
        """The Bayesian parameters, in the order in which they are drawn."""
        return list(bayesian_parameters(self._root)) if self._parameters is None else self._parameters

    def draw(self, number: int) -> Draw:
        """Draw network ``number``, in order. Drop the one before first, to have its memory used.

        They start from 0, or, if they are repeatable, from anywhere; antithetic ones from an even number.
        """
        if self._gradients:
            return Draw(self.parameters)
        self.samples.clear()
        self._mirrored = self._antithetic and number % 2 == 1
        if self._repeatable:
            while number >= len(self._seeds):
                self._seeds.append(next_seed(self._source))
            devices = {parameter.mean.device for parameter in self.parameters}
            self._generators = {each: torch.Generator(each).manual_seed(self._seeds[number]) for each in devices}
        with torch.no_grad():
            return Draw(self.parameters, self._make)

    def _make(self, parameter: BayesianParameter) -> Tensor:
        mean = parameter.mean
        if not parameter.posterior.has_noise:
            return mean
        kept = self._kept.get(id(mean))
        if kept is None:
            sigma = std(parameter.rho).to(mean.dtype) if parameter.has_rho else None
            kept = self._kept[id(mean)] = _Kept(mean, parameter.kept_mean, sigma)
        generator = self._generators.get(mean.device)
        if kept.std is not None and kept.is_plain:
            made = kept.overwrite(kept.std, self._antithetic, self._mirrored, generator)
        else:
            if kept.noise is None or not self._mirrored:
                kept.noise = parameter.posterior.noise(parameter, generator)
            made = parameter.posterior.sample(parameter, -kept.noise if self._mirrored else kept.noise)
        self.samples[id(mean)] = made
        return made


@dataclass
class _Kept:
    """One parameter from draw to draw: its moments, and the memory of its sample and of its noise."""

    parameter: Tensor  # so that its identity stays its own
    mean: Tensor
    std: Tensor | None
    sample: Tensor | None = None
    noise: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Tell whether its sample can be made in place: not if sharded, or seen by ``torch.func``."""
        return (
            all(type(tensor) in (Tensor, nn.Parameter) for tensor in (self.mean, self.std))
            and self.std is not None
            and not in_transform()
        )

    def overwrite(self, std: Tensor, antithetic: bool, mirrored: bool, generator: torch.Generator | None) -> Tensor:
        """Draw one sample, in the memory of the one before where nobody holds that."""
        if self.sample is None or memory_is_shared(self.sample):
            self.sample = torch.empty_like(self.mean, requires_grad=False)
        if not antithetic:
            self.noise = self.sample  # one memory for both
        elif self.noise is None:
            self.noise = torch.empty_like(self.sample)
        if not mirrored:
            standard_normal_(self.noise, generator)
        torch.addcmul(self.mean, std, self.noise, value=-1 if mirrored else 1, out=self.sample)
        return self.sample.detach()  # a tensor of its own, to which a layer may attach what it computes from it
