"""Bayesian LoRA over a base that FSDP2 has sharded: the gradients of one process, and some steps of the ELBO.

Run it by ``torchrun --nproc_per_node=2 -m benchmarks.quality.lora_sharded --data DATA``.
"""

from __future__ import annotations

import argparse
import copy
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import bnnify

from ..harness import report
from ..harness.networks.language_model import smollm2
from ..harness.progress import track
from ..harness.report import Run, Table
from .lora_sst2 import ANSWERS, PROMPT, sentences

Batch = tuple[dict[str, Tensor], Tensor]
"""What the tokenizer makes of some sentences, and their labels."""
Loss = Callable[[nn.Module, Batch], Tensor]


def main() -> None:
    options = _options()
    run = Run(options, ("bnnify", "torch", "transformers", "peft"))
    dist.init_process_group("gloo")
    tables = measured(options)
    if dist.get_rank() == 0:
        run.record([table.rows for table in tables])
        run.show(*tables)
    dist.destroy_process_group()


def measured(options: argparse.Namespace) -> list[Table]:
    """Let the first rank train alone, over a whole base, as all ranks do afterwards with parts of the same batches.

    And let every rank take gradients over a whole base before it does so over its shard, of the same network.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    tokenizer, base = smollm2()
    batches, num_data = _batches(tokenizer, options.data, options.steps, options.batch_size * ranks)
    parts = [({name: x[rank::ranks] for name, x in inputs.items()}, y[rank::ranks]) for inputs, y in batches]
    answers = [tokenizer(word).input_ids[0] for word in ANSWERS]
    bnn = adapted(base)

    def loss(bnn: nn.Module, batch: Batch) -> Tensor:
        output, kl = bnn(**batch[0], logits_to_keep=1)
        return bnnify.elbo(F.cross_entropy(output.logits[:, -1, answers], batch[1]), kl, num_data=num_data)

    expected, alone = gradients(bnn, loss, parts[0]), torch.empty(0)
    average(expected.values())
    if rank == 0:
        alone = trained(copy.deepcopy(bnn), loss, track(batches, "one process"), options.lr)
    dist.barrier()

    shard_base(bnn)
    found = gradients(bnn, loss, parts[0])
    average(found.values())
    torch.manual_seed(rank)  # from now on every rank draws networks of its own
    together = trained(bnn, loss, parts, options.lr, parallel=True)
    average([together])
    adapters = torch.cat([p.detach().flatten() for name, p in bnn.named_parameters() if ".lora_" in name])
    of_ranks = [torch.empty_like(adapters) for _ in range(ranks)]
    dist.all_gather(of_ranks, adapters)
    if rank:
        return []
    if options.adapters:
        bnnify.collapse(bnn, inplace=True).save_pretrained(str(options.adapters))

    errors = {name: ((found[name] - grad).abs().max() / grad.abs().max()).item() for name, grad in expected.items()}
    sharded = [parameter for parameter in bnn.parameters() if isinstance(parameter, DTensor)]
    rows = [
        ["gradients of means, largest relative error", f"{max(errors[n] for n in errors if n.endswith('weight')):.1e}"],
        ["gradients of ρ, largest relative error", f"{max(errors[n] for n in errors if n.endswith('_rho')):.1e}"],
        ["adapters of all ranks at the end", "equal" if all(x.equal(adapters) for x in of_ranks) else "different"],
        ["base, bytes", f"{sum(parameter.nbytes for parameter in sharded):,}"],
        ["base, bytes on the first rank", f"{sum(parameter.to_local().nbytes for parameter in sharded):,}"],
    ]
    losses = [
        [f"{start + 1} to {start + 5}", *(f"{each[start : start + 5].mean():.3f}" for each in (alone, together))]
        for start in range(0, options.steps, 5)
    ]
    headings = ["steps", "one process", f"{ranks} ranks"]
    return [Table(f"{ranks} ranks", ["", "found"], rows), Table("Loss, mean of five steps", headings, losses)]


def adapted(base: Any) -> bnnify.BayesianModel:
    """Put adapters into the model, the same on all ranks, and make them Bayesian while everything is whole."""
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.02)  # through zeros no gradient would reach A
    # The prior is as wide as σ, as it is after tune_std.
    return bnnify.convert(model, select="*.lora_*", prior=bnnify.Pretrained(), inplace=True).train()


def shard_base(bnn: Any) -> None:
    """Shard all but the adapters and what stands beside them; these stay whole on every rank."""
    adapters = {parameter for name, parameter in bnn.named_parameters() if ".lora_" in name}
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (*bnn.module.base_model.model.model.layers, bnn.module):
        fully_shard(module, mesh=mesh, ignored_params=adapters)


def average(tensors: Iterable[Tensor]) -> None:
    """Average over the ranks, in place. DDP, which does that for gradients, takes no model with sharded parameters."""
    for tensor in tensors:
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()


def gradients(bnn: nn.Module, loss: Loss, batch: Batch) -> dict[str, Tensor]:
    """Take the gradients of one network: on each rank another, and on one rank always the same."""
    torch.manual_seed(1)
    loss(bnn, batch).backward()
    found = {name: parameter.grad for name, parameter in bnn.named_parameters() if parameter.grad is not None}
    bnn.zero_grad()
    return found


def trained(bnn: Any, loss: Loss, batches: Iterable[Batch], lr: float, parallel: bool = False) -> Tensor:
    """Take a step of Adam for each batch, with the gradients of all ranks if ``parallel``; return the losses."""
    optimizer, losses = torch.optim.Adam(bnn.parameter_groups(lr=lr, rho_lr=1e-2)), []
    for batch in batches:
        losses.append(loss(bnn, batch))
        losses[-1].backward()
        if parallel:
            average(parameter.grad for parameter in bnn.parameters() if parameter.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses).detach()


def _batches(tokenizer: Any, folder: Path, steps: int, size: int) -> tuple[list[Batch], int]:
    """Read short sentences, and how many there are. Padding stands in front: the answer follows the last token."""
    with zipfile.ZipFile(folder / "sst2.zip") as archive:
        short = [row for row in sentences(archive.read("train.tsv").decode()) if 4 <= len(row[0].split()) <= 8]
    order = torch.randperm(len(short), generator=torch.Generator().manual_seed(0))
    tokenizer.pad_token = tokenizer.eos_token
    batches = []
    for numbers in order[: steps * size].split(size):
        texts, labels = zip(*(short[i] for i in numbers), strict=True)
        prompts = [PROMPT.format(text) for text in texts]
        ids = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
        batches.append((dict(ids), torch.tensor(labels)))
    return batches, len(short)


def _options() -> argparse.Namespace:
    parser = report.parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder with sst2.zip")
    parser.add_argument("--adapters", type=Path, help="where the first rank saves the means of the adapters, for peft")
    parser.add_argument("--steps", type=int, default=40, help="each on other sentences")
    parser.add_argument("--batch-size", type=int, default=8, help="sentences of each rank in a step")
    parser.add_argument("--lr", type=float, default=3e-4, help="of the means")
    return parser.parse_args()


if __name__ == "__main__":
    main()
