"""Counts what ranks send each other in a training step, and times the step against ranks and networks."""

from __future__ import annotations

import time
from collections import Counter
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..harness import report
from ..harness.report import Run, Table
from .llama import VARIANTS, imagine, in_processes, llama, shard, variant
from .rho_gradients import HOOKS

KINDS = {
    "_allgather_base_": "FSDP gathers",
    "all_gather_into_tensor": "draws gather",
    "_reduce_scatter_base_": "FSDP reduces",
    "reduce_scatter_tensor": "draws reduce",
}


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 64])
    parser.add_argument("--rounds", type=int, default=10, help="steps of each kind that are timed, in turn")
    options = parser.parse_args()
    run = Run(options, ["torch", "bnnify", "transformers"])
    columns = [*KINDS.values(), "together"]
    fsdp = Table("FSDP2: what goes through a step, × the plain model's bytes", ["", "ranks", *columns], [])
    ddp = Table("DDP: gradients in a step", ["", "hook", "MB", "buckets of 1 MB"], [], 2)
    for name, (real, gradients) in in_processes(of_steps).items():
        for ranks in options.ranks:
            imagine(ranks)
            found = of_a_step(name)
            dist.destroy_process_group()
            if ranks == 2 and found != real:
                raise SystemExit(f"{name}: {found} between imaginary ranks, but {real} between real ones")
            figures = [found.get(kind, 0.0) for kind in KINDS.values()]
            fsdp.rows.append([name, str(ranks), *(f"{figure:.2f}" for figure in (*figures, sum(figures)))])
        for hook, (size, buckets) in gradients.items():
            ddp.rows.append([name, hook, f"{size / 1e6:.1f}", str(buckets)])
    run.record([fsdp.rows, ddp.rows])
    times = Table(
        "time of a step, × that of the deterministic model", ["", "ranks", *(f"K = {k}" for k in (1, 2, 4))], []
    )
    for ranks in (1, 2) if options.rounds else ():
        for kind, ratios in in_processes(time_of_steps, options.rounds, ranks=ranks).items():
            times.rows.append([kind, str(ranks), *(f"{ratio:.1f}" for ratio in ratios)])
    run.record([fsdp.rows, ddp.rows, times.rows])
    run.show(fsdp, ddp, *([times] if options.rounds else []))


def of_steps() -> dict[str, tuple[dict[str, float], dict[str, tuple[int, int]]]]:
    """Count for each variant what a step sends under FSDP2, and under DDP with each hook."""
    hooks = {name: ["float32", *([] if name == "deterministic" else list(HOOKS)[1:])] for name in VARIANTS}
    return {
        name: (of_a_step(name), {hook: gradients_of_a_step(name, hook) for hook in hooks[name]}) for name in VARIANTS
    }


class Ledger(TorchDispatchMode):
    """Counts the bytes of the larger side of each collective: of what is gathered, or of what is reduced."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        name = operator.__name__.partition(".")[0]
        if operator.namespace in ("c10d", "_c10d_functional") and name in KINDS:
            sizes = [leaf.nbytes for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor)]
            self.bytes[KINDS[name]] += max(sizes)
        return result


def of_a_step(name: str) -> dict[str, float]:
    """Count the bytes of one forward and backward under FSDP2, in units of the plain model's."""
    torch.manual_seed(0)
    plain = llama("small", "cpu")
    size = sum(parameter.nbytes for parameter in plain.parameters())
    model = variant(name, plain)
    shard(model)
    loss(model, 1).backward()  # FSDP sets itself up in the first pass
    with Ledger() as ledger:
        loss(model, 1).backward()
    return {kind: number / size for kind, number in ledger.bytes.items()}


def gradients_of_a_step(name: str, hook: str) -> tuple[int, int]:
    """Count the bytes of the gradients that DDP reduces in a step, and its buckets."""
    torch.manual_seed(0)
    model = DistributedDataParallel(variant(name, llama("small", "cpu")), bucket_cap_mb=1)
    seen: list[int] = []

    def counted(bnn, bucket):  # DDP takes no annotated hook
        seen.append(sum(part.nbytes for part in HOOKS[hook].sent(bnn, bucket)[1]))
        return HOOKS[hook](bnn, bucket)

    model.register_comm_hook(model.module, counted)
    loss(model, 1).backward()
    seen.clear()  # DDP has made its buckets anew after the first pass
    loss(model, 1).backward()
    return sum(seen), len(seen)


def time_of_steps(rounds: int) -> dict[str, list[float]]:
    """Compare the steps of K networks with those of the deterministic model, for both kinds of parallelism."""
    return {kind: _time_of_steps(kind, rounds) for kind in ("DDP", "FSDP2")}


def _time_of_steps(kind: str, rounds: int) -> list[float]:
    """Compare steps with K networks in each, in turn with those of the deterministic model; return median ratios."""
    steps = []
    for name, networks in (("deterministic", 1), ("Bayesian", 1), ("Bayesian", 2), ("Bayesian", 4)):
        torch.manual_seed(0)
        model: Any = variant(name, llama("small", "cpu"))
        if kind == "DDP":
            model = DistributedDataParallel(model)
        else:
            shard(model)
        optimizer = torch.optim.Adam(model.parameters())
        steps.append((model, optimizer, networks))
    found = []
    for _ in range(rounds + 1):
        seconds = []
        for model, optimizer, networks in steps:
            dist.barrier()
            started = time.perf_counter()
            optimizer.zero_grad()
            loss(model, networks).backward()
            optimizer.step()
            seconds.append(time.perf_counter() - started)
        found.append([each / seconds[0] for each in seconds[1:]])
    return [median(ratios) for ratios in zip(*found[1:], strict=True)]


def loss(model: Any, networks: int) -> Tensor:
    """Compute the loss of 4 texts of 64 tokens: its mean over so many networks, and the KL."""
    ids = torch.randint(0, 1024, (4, 64))
    total = torch.zeros(())
    for _ in range(networks):
        result = model(ids, labels=ids)
        output, kl = result if isinstance(result, tuple) else (result, 0.0)
        total = total + (output.loss + kl / 1000) / networks
    return total


if __name__ == "__main__":
    main()
