"""Who runs what of a prediction that the ranks of a process group make together."""

__all__ = ["Share"]

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.utils.data import DistributedSampler

from ..draws.processes import next_seed, together
from ..draws.sharding import is_sharding
from ..errors import ArgumentError, ArgumentTypeError, describe
from ..modules.parameters import bayesian_parameters
from .batches import Arguments, is_one_batch
from .loop import beginning

_LOADER = (
    "DataLoader(dataset, sampler=DistributedSampler(dataset, torch.distributed.get_world_size(group), "
    "torch.distributed.get_rank(group), shuffle=False))"
)


class Share:
    """What this rank does of a prediction: some of the networks, for some of the batches.

    Args:
        group: The process group, all ranks of which make their shares at a time.
        module: The model.
        inputs: What ``predict`` was given.
        num_samples: The number of networks.
        seed: What names them. Default: ``None``, drawn on the first rank.
        antithetic: They come in pairs, which stay together. Default: ``False``.
        closed_form: They do not run one by one. Default: ``False``.

    Attributes:
        networks: The numbers of the networks of this rank.
        seed: What names them, the same on every rank.
        part: The number of the part of the data that this rank looks at.
        parts: The number of parts of the data.
        sampler: The ``DistributedSampler`` that divides the data; None if all ranks are given all of them.
        splits_networks: True if no rank runs all networks for its part of the data.
        num_samples: The number of networks of all ranks.

    Raises:
        ArgumentTypeError: ``group`` is no process group.
        ArgumentError: The ranks were called with different arguments, or the model or the data cannot be split so.
    """

    def __init__(
        self,
        group: Any,
        module: nn.Module,
        inputs: Any,
        num_samples: int,
        seed: int | None = None,
        *,
        antithetic: bool = False,
        closed_form: bool = False,
    ) -> None:
        if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
            raise ArgumentTypeError(
                "predict(group) takes a process group of torch.distributed to which this rank belongs, such as "
                f"torch.distributed.group.WORLD, not {describe(group)}."
            )
        self._group, self._seen = group, hashlib.sha256()
        self.num_samples, self.sampler = num_samples, _sampler_of(inputs)
        list(bayesian_parameters(module))  # which finds the ranks that compute together
        given = {
            "num_samples": num_samples,
            "seed": seed,
            "antithetic": antithetic,
            "closed_form": closed_form,
            "one batch": is_one_batch(inputs),
            "sampler": _described(self.sampler),
        }
        found = self.gathered((given, next_seed(), None if self.sampler is None else self.sampler.rank))
        all_given, seeds, parts = zip(*found, strict=True)
        self.seed = seeds[0] if seed is None else seed
        is_sharded = any(map(is_sharding, module.modules()))
        self._check(all_given, parts, is_sharded)

        # How many networks stay together, and the number of ranks for each part of the data.
        step = num_samples if closed_form or is_sharded else 1 + antithetic
        steps, rank, ranks = -(-num_samples // step), dist.get_rank(group), len(parts)
        if self.sampler is None:
            alike = min(steps, ranks)
            self.parts = 1 if is_one_batch(inputs) else ranks // alike
            self.part, number = divmod(rank, alike)
        else:
            self.part, self.parts = self.sampler.rank, self.sampler.num_replicas
            alike, number = ranks // self.parts, parts[:rank].count(self.part)
        start, stop = (min(step * (steps * each // alike), num_samples) for each in (number, number + 1))
        self.networks = range(start, stop) if self.part < self.parts else range(0)
        self.splits_networks = min(steps, alike) > 1

    def own(self, batches: Iterable[Arguments]) -> Iterator[Arguments]:
        """Yield those of the batches that are this rank's: all that a loader with a ``DistributedSampler`` gives."""
        for number, arguments in enumerate(batches):
            if self.sampler is None:
                self._seen.update(beginning(arguments).encode())
            if self.networks and (self.sampler is not None or number % self.parts == self.part):
                yield arguments

    @property
    def splits_data(self) -> bool:
        """True if there are rows of the output that this rank does not compute."""
        return self.sampler is not None or self.parts > 1

    @property
    def seen(self) -> str:
        """A digest of the batches so far, which have to be the same on all ranks without a ``DistributedSampler``."""
        return self._seen.hexdigest()

    def gathered(self, value: Any) -> list[Any]:
        """What each rank of the group has called this with."""
        values = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(values, value, group=self._group)
        return values

    def add_up(self, tensor: Any) -> None:
        """Add the tensors of the other ranks to this one's, in place."""
        dist.all_reduce(tensor, group=self._group)

    def _check(self, given: tuple[Any, ...], parts: tuple[Any, ...], is_sharded: bool) -> None:
        differing = [name for name in given[0] if any(each[name] != given[0][name] for each in given)]
        if differing:
            what = "; ".join(f"{name}: {[each[name] for each in given]}" for name in differing)
            raise ArgumentError(f"The ranks of the group called predict with different arguments. By rank, {what}.")
        ranks = set(dist.get_process_group_ranks(self._group))
        if any(len(ranks.intersection(dist.get_process_group_ranks(each))) > 1 for each in together.groups):
            raise ArgumentError(
                "Ranks of the group compute each network together (tensor parallelism), so that nothing can be split "
                'over them: pass the group of ranks that have data of their own, such as mesh["data"].get_group().'
            )
        if self.sampler is None:
            if is_sharded:
                raise ArgumentError(
                    "The ranks of a model that FSDP has sharded run each network together, for as many batches each: "
                    f"pass predict(group) a loader that gives them data of their own, {_LOADER}, or leave group out."
                )
            return
        number, examples = self.sampler.num_replicas, len(self.sampler.dataset)  # type: ignore[arg-type]
        if self.sampler.drop_last and examples % number:
            raise ArgumentError(
                f"The sampler has drop_last=True, and leaves out {examples % number} of {examples} examples: pass "
                f"{_LOADER}."
            )
        alike = 1 if is_sharded else len(ranks) // number
        if sorted(parts) != sorted([*range(number)] * alike):
            raise ArgumentError(
                f"The samplers of the {len(ranks)} ranks give the parts {list(parts)} of {number}, and each has to be "
                f"that of {'one rank' if is_sharded else 'equally many ranks'}: pass {_LOADER}."
            )


def _sampler_of(inputs: Any) -> "DistributedSampler[Any] | None":
    for owner in (getattr(inputs, "batch_sampler", None), inputs):
        sampler = getattr(owner, "sampler", None)
        if isinstance(sampler, DistributedSampler):
            return sampler
    return None


def _described(sampler: "DistributedSampler[Any] | None") -> str:
    if sampler is None:
        return "none"
    names = ("num_replicas", "num_samples", "shuffle", "seed", "epoch", "drop_last")
    settings = ", ".join(f"{name}={getattr(sampler, name)}" for name in names)
    return f"{type(sampler).__name__}({len(sampler.dataset)} examples, {settings})"  # type: ignore[arg-type]
