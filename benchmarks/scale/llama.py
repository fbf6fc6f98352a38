"""Llamas of several sizes, sharded by FSDP2 over real or imaginary ranks."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM

import bnnify

SHAPES: dict[str, dict[str, int]] = {
    "7 B": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "layers": 32, "heads": 32},
    "70 B": {"vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 28672, "layers": 80, "heads": 64},
    "small": {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 704, "layers": 4, "heads": 8},
}
"""Those of Llama 2, of which the largest has 8 heads for keys and values, and a small one to run."""


def llama(size: str, device: str = "meta") -> LlamaForCausalLM:
    """Make a model in float32 whose head is not tied."""
    shape = SHAPES[size]
    config = LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=min(8, shape["heads"]) if size != "7 B" else shape["heads"],
        tie_word_embeddings=False,
    )
    with torch.device(device):
        return LlamaForCausalLM(config)


def variant(name: str, model: nn.Module) -> Any:
    """Leave the model as it is, or convert it."""
    return model if name == "deterministic" else bnnify.convert(model, inplace=True)


VARIANTS = ("deterministic", "Bayesian")


def shard(model: Any) -> None:
    """Shard each block, and the rest, over all ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    module = model.module if isinstance(model, bnnify.BayesianModel) else model
    for block in module.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


def imagine(ranks: int) -> None:
    """Be the first of so many ranks, of which the others are not there: collectives return at once, with anything."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)


def in_processes(function: Callable[..., Any], *arguments: Any, ranks: int = 2) -> Any:
    """Call ``function(*arguments)`` on several gloo processes; return what the first gives."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, (folder, ranks, function, arguments), nprocs=ranks)
        return torch.load(Path(folder, "result"), weights_only=True)


def _process(rank: int, folder: str, ranks: int, function: Callable[..., Any], arguments: Iterable[Any]) -> None:
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    dist.init_process_group("gloo", init_method=Path(folder, "here").as_uri(), rank=rank, world_size=ranks)
    result = function(*arguments)
    if rank == 0:
        torch.save(result, Path(folder, "result"))
    dist.barrier()
    dist.destroy_process_group()


def kind(name: str) -> str:
    """Say what a parameter is by its name."""
    return "ρ" if name.endswith("_rho") else "prior mean" if name.endswith("_prior_mean") else "mean"


def local(tensor: Tensor) -> Tensor:
    """Return what this rank has of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def expected_bytes(model: nn.Module) -> dict[str, int]:
    """Count what this rank keeps between steps, for Adam: from the shapes alone."""
    found: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        size = local(parameter).nbytes
        found[kind(name)] += size
        if parameter.requires_grad:
            found["gradients"] += size
            found["Adam"] += 2 * size
    return dict(found)


def actual_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Count the same from the tensors that are there after a step, but for Adam's counts of steps."""
    found: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        found[kind(name)] += local(parameter).nbytes
        if parameter.grad is not None:
            found["gradients"] += local(parameter.grad).nbytes
        state = optimizer.state.get(parameter, {})
        found["Adam"] += sum(local(value).nbytes for value in state.values() if value.ndim)
    return dict(found)
