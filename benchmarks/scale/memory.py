"""Counts the memory of each rank under FSDP2, from the shapes of a 7 B and a 70 B model and in a small real run."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..harness import report
from ..harness.report import Run, Table, digits
from ..harness.saved_tensors import saved_bytes
from .llama import VARIANTS, actual_bytes, expected_bytes, imagine, in_processes, llama, local, shard, variant

KINDS = ("mean", "ρ", "prior mean", "gradients", "Adam")


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 64, 1024])
    parser.add_argument("--sizes", nargs="+", default=["7 B", "70 B"])
    options = parser.parse_args()
    run = Run(options, ["torch", "bnnify", "transformers"])
    headings = [*KINDS, "together", "× deterministic"]
    large = Table("GB of each rank between steps, in float32", ["", "ranks", *headings], [])
    real = Table("small model, 2 ranks: MB of each rank", ["", "", *headings], [], 2)
    saved = Table("small model, 2 ranks: MB kept for the backward pass", ["", "as it is", "blocks checkpointed"], [])
    for size in options.sizes:
        large.rows.append([size])
        for ranks in options.ranks:
            found = [on_paper(size, ranks, name) for name in VARIANTS]
            for name, each in zip(VARIANTS, found, strict=True):
                large.rows.append([name, f"{ranks:,}", *_row(each, found[0], 1e9)])
            run.record([large.rows])
    for name, (counted, *kept) in in_processes(small_runs).items():
        expected, plain = on_paper("small", 2, name), on_paper("small", 2, "deterministic")
        real.rows.append([name, "on paper", *_row(expected, plain, 1e6)])
        real.rows.append(["", "counted", *_row(counted, plain, 1e6)])
        saved.rows.append([name, *(f"{figure / 1e6:.1f}" for figure in kept)])
        if counted != expected:
            raise SystemExit(f"{name}: {counted} was counted, but {expected} expected")
    run.record([large.rows, real.rows, saved.rows])
    run.show(large, real, saved)


def on_paper(size: str, ranks: int, name: str) -> dict[str, int]:
    """Convert a model without values, shard it over imaginary ranks, and count."""
    imagine(ranks)
    model = variant(name, llama(size))
    shard(model)
    found = expected_bytes(model)
    dist.destroy_process_group()
    return found


def small_runs() -> dict[str, tuple[dict[str, int], int, int]]:
    """Of each variant: what is there after a step, and what a forward keeps without and with checkpointing."""
    return {name: (one_step(name), *(kept_by_a_forward(name, each) for each in (False, True))) for name in VARIANTS}


def one_step(name: str) -> dict[str, int]:
    """Train one step on this rank, and count what is there."""
    model, module, loss = _small(name)
    optimizer = torch.optim.Adam(module.parameters())
    loss(model).backward()
    optimizer.step()
    return actual_bytes(module, optimizer)


def kept_by_a_forward(name: str, checkpoints: bool) -> int:
    """Count the bytes that the graph of a loss holds beside the shards of the parameters."""
    model, module, loss = _small(name)
    if checkpoints:
        for block in module.model.layers:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    loss(model).backward()  # FSDP sets itself up in the first pass
    return saved_bytes(partial(loss, model), [local(parameter) for parameter in module.parameters()])


def _small(name: str):
    torch.manual_seed(0)
    model = variant(name, llama("small", "cpu"))
    module = model if name == "deterministic" else model.module
    shard(model)
    ids = torch.randint(0, 1024, (2, 16))

    def loss(model) -> Tensor:
        if name == "deterministic":
            return model(ids, labels=ids).loss
        output, kl = model(ids, labels=ids)
        return output.loss + kl / 1000

    return model, module, loss


def _row(found: dict[str, int], plain: dict[str, int], unit: float) -> list[str]:
    total = sum(found.values())
    figures = [*(found.get(kind, 0) for kind in KINDS), total]
    return [*(digits(figure / unit) for figure in figures), f"{total / sum(plain.values()):.2f}"]


if __name__ == "__main__":
    main()
