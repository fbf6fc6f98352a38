"""The loop over epochs of the ELBO, which keeps the epoch that is best on held-out data."""

__all__ = ["FineTuning", "Plan"]

import copy
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ...errors import ArgumentError
from ...model import BayesianModel
from ...prediction.batches import Arguments, labelled_batches_of
from ...prediction.eval_mode import evaluating
from ...prediction.known_likelihoods import as_likelihood
from ...prediction.likelihood import IGNORED
from ...training.elbo import elbo
from ...training.held_out import Labelled
from ..data import Examples
from ..meaning import Meaning
from .ranks import Ranks


@dataclass(frozen=True)
class Plan:
    """How to train: the number of epochs and data, the learning rates, the weight of the KL, and when to stop."""

    epochs: int
    lr: float
    rho_lr: float
    beta: float
    batch_size: int
    num_data: int
    num_samples: int
    patience: int
    seed: int


class _Objective(nn.Module):
    """The negative ELBO of a batch, as one module, so that processes share the gradient of the noise too."""

    def __init__(self, bnn: BayesianModel, nll: nn.Module, meaning: Meaning, plan: Plan) -> None:
        super().__init__()
        self.bnn, self.nll, self._meaning, self._plan = bnn, nll, meaning, plan

    def forward(self, arguments: Arguments, target: Any) -> tuple[Tensor, Tensor, Tensor]:
        args, kwargs = arguments
        output, kl = self.bnn(*args, **kwargs)
        nll = self.nll(self._meaning.chosen(output), target)
        return elbo(nll, kl, self._plan.num_data, self._plan.beta), nll.detach(), kl.detach()


class FineTuning:
    """A training that can be interrupted after each epoch.

    The random numbers of an epoch depend on the seed, the epoch and the rank alone, so that a training that goes on
    from its :meth:`state` is the same as one that was not interrupted.
    """

    def __init__(
        self,
        bnn: BayesianModel,
        meaning: Meaning,
        train: Examples,
        validation: Examples,
        plan: Plan,
        ranks: Ranks,
    ) -> None:
        self.bnn, self.nll, self.plan, self.ranks = bnn, meaning.nll(), plan, ranks
        self._meaning, self._train, self._validation = meaning, train, validation
        device = next(bnn.parameters()).device
        objective = _Objective(bnn, self.nll.to(device), meaning, plan)
        self._objective: nn.Module = objective
        groups = bnn.parameter_groups(plan.lr, plan.rho_lr)
        if noise := [*self.nll.parameters()]:
            groups.append({"name": "noise", "params": noise, "lr": plan.rho_lr, "weight_decay": 0.0})
        if ranks.world_size > 1:
            self._objective = DistributedDataParallel(objective, find_unused_parameters=True)
        self._optimizer = torch.optim.Adam(groups)
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, plan.epochs)
        self.epoch = 0
        self.best_epoch, self.best_nll = 0, math.inf
        self._best: dict[str, Any] = {}

    @property
    def noise_std(self) -> float | None:
        """The noise of a regression, as it is now; None if none is learned."""
        std = getattr(self.nll, "std", None)
        return None if std is None else std.item()

    @property
    def done(self) -> bool:
        """Whether all epochs are over, or the last ones brought nothing."""
        return self.epoch >= self.plan.epochs or self.epoch - self.best_epoch >= self.plan.patience

    def begin(self) -> dict[str, Any]:
        """Look how good the model is before training, which may be the best it ever is."""
        return self._judged({"epoch": 0, "train_nll": None, "kl": self.bnn.kl().item(), "seconds": None})

    def step(self, advance: Callable[..., None]) -> dict[str, Any]:
        """Train for one epoch, and return its figures."""
        plan, start = self.plan, time.perf_counter()
        self.epoch += 1
        # A rank has masks of its own too, where the model has a dropout.
        torch.manual_seed((plan.seed * 1_000_003 + self.epoch) * 1_009 + self.ranks.rank)
        self.bnn.train()
        total, count, kl = 0.0, 0, 0.0
        for arguments, target in labelled_batches_of(self._batches(), self.bnn.module, "finetune"):
            loss, nll, kl_of_batch = self._objective(arguments, target)
            if not torch.isfinite(loss):
                raise ArgumentError(
                    f"The loss is {loss.item()} in epoch {self.epoch}. Lower --lr and --rho-lr, and look at the data."
                )
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
            total, count, kl = total + nll.item(), count + 1, kl_of_batch.item()
            advance(description=f"epoch {self.epoch} of {plan.epochs}, NLL {total / count:.4f}")
        self._schedule.step()
        total, count = self.ranks.total(total, count)  # type: ignore[assignment]
        seconds = time.perf_counter() - start
        return self._judged({"epoch": self.epoch, "train_nll": total / count, "kl": kl, "seconds": seconds})

    def state(self) -> dict[str, Any]:
        """What a training needs to go on, as plain data and tensors."""
        return {
            "epoch": self.epoch,
            "best_epoch": self.best_epoch,
            "best_nll": self.best_nll,
            "best": self._best,
            "now": self._weights(),
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state`."""
        self.epoch, self.best_epoch, self.best_nll = state["epoch"], state["best_epoch"], state["best_nll"]
        self._best = state["best"]
        self._load(state["now"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])

    def take_best(self) -> None:
        """Give the model the weights of the best epoch."""
        self._load(self._best)

    def num_batches(self) -> int | None:
        """The number of batches in an epoch; None if the loader does not tell."""
        try:
            return len(self._batches())  # type: ignore[arg-type]
        except TypeError:
            return None

    def _batches(self) -> Iterable[Any]:
        """The batches of this process in an epoch, shuffled."""
        generator = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + self.epoch)
        order = self.ranks.share(torch.randperm(len(self._train), generator=generator).tolist(), even=True)
        if len(order) > self.plan.batch_size and len(order) % self.plan.batch_size == 1:
            order = order[:-1]  # a batch of one has no variance for a batch normalisation
        return self._train.batches(self.plan.batch_size, order)

    def _judged(self, figures: dict[str, Any]) -> dict[str, Any]:
        """Add the NLL of the held-out data, and remember the epoch if it is the best one."""
        nll = figures["held_out_nll"] = self._held_out_nll()
        figures["noise_std"] = self.noise_std
        if nll < self.best_nll or not self._best:
            self.best_epoch, self.best_nll = self.epoch, nll
            self._best = copy.deepcopy(self._weights())
        return figures

    @torch.no_grad()
    def _held_out_nll(self) -> float:
        """The NLL of the average of ``num_samples`` networks, each seen by all of the held-out data."""
        likelihood, total, count = as_likelihood(self.nll), 0.0, 0
        order = self.ranks.share(range(len(self._validation)), even=False)
        batches = self._validation.batches(self.plan.batch_size, order)
        with evaluating(self.bnn):
            for batch in labelled_batches_of(batches, self.bnn.module, "finetune"):
                torch.manual_seed(self.plan.seed)  # the same networks for each batch and epoch
                held_out = Labelled(self.bnn.module, [batch], likelihood, self._meaning.output, IGNORED)
                total += held_out.loss(self.plan.num_samples) * held_out.num_data
                count += held_out.num_data
        total, number = self.ranks.total(total, count)
        return total / number if number else math.inf

    def _weights(self) -> dict[str, Any]:
        return {"model": self.bnn.module.state_dict(), "nll": self.nll.state_dict()}

    def _load(self, weights: dict[str, Any]) -> None:
        self.bnn.module.load_state_dict(weights["model"])
        self.nll.load_state_dict(weights["nll"])
