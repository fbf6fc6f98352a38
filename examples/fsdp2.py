"""Fine-tunes a sharded Bayesian network by the ELBO, with FSDP2; resumes from a sharded checkpoint, and saves one file.

    torchrun --nproc_per_node=2 examples/fsdp2.py --checkpoint fsdp2

Means, ρ and the means of the prior are sharded alike. All processes draw one network together: each draws the noise of
its shard, whatever the seed.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import bnnify
from bnnify.cli.demo import load_digits


class Checkpointed(nn.Module):
    """Runs a part of a model again in the backward pass, with the same sample, instead of keeping what it computed."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.part, x, use_reentrant=False)


def main() -> None:
    options = _options()
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(0)
    layers, train, test = load_digits()
    network = nn.Sequential(Checkpointed(layers[:5]), layers[5:])

    bnn = bnnify.convert(network, prior=bnnify.Gaussian(std=1.0)).to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if options.bfloat16 else None
    policy = {"mp_policy": half} if half else {}
    for part in bnn.module:  # the model and its parts, and not the wrapper
        fully_shard(part, mesh=mesh, **policy)
    fully_shard(bnn.module, mesh=mesh, **policy)
    optimizer = torch.optim.Adam(bnn.parameter_groups(lr=3e-3, rho_lr=1e-2))
    data = TensorDataset(train.images, train.labels)
    sampler = DistributedSampler(data)
    loader = DataLoader(data, batch_size=25, sampler=sampler)

    rank, first = f"random numbers of rank {dist.get_rank()}", len([*options.checkpoint.glob("epoch-*")])
    if first:
        weights, moments = get_state_dict(bnn.module, optimizer)
        state = {"model": weights, "optimizer": moments, rank: torch.get_rng_state()}
        dcp.load(state, checkpoint_id=options.checkpoint / f"epoch-{first}")
        set_state_dict(bnn.module, optimizer, model_state_dict=weights, optim_state_dict=moments)
        torch.set_rng_state(state[rank])
    for epoch in range(first, options.epochs):
        sampler.set_epoch(epoch)
        for images, labels in loader:
            logits, kl = bnn(images.to(device))
            loss = bnnify.elbo(F.cross_entropy(logits.float(), labels.to(device)), kl, num_data=len(data))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(bnn.parameters(), 10.0)
            optimizer.step()
        weights, moments = get_state_dict(bnn.module, optimizer)
        state = {"model": weights, "optimizer": moments, rank: torch.get_rng_state()}
        dcp.save(state, checkpoint_id=options.checkpoint / f"epoch-{epoch + 1}")

    # All ranks predict together, with the same networks and the same images.
    probabilities = bnn.predict(test.images.to(device), 16, likelihood="logits").mean.cpu()
    bnnify.save(bnn, options.checkpoint / "model.bnn.pt")
    if dist.get_rank() == 0:
        print(f"NLL on {len(test.labels)} test digits: {F.nll_loss(probabilities.log(), test.labels):.3f}")
    dist.barrier()  # no rank leaves while another still needs it
    dist.destroy_process_group()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="the folder where to stop and resume")
    parser.add_argument("--epochs", type=int, default=20, help="default: 20")
    parser.add_argument("--bfloat16", action="store_true", help="compute in bfloat16")
    return parser.parse_args()


if __name__ == "__main__":
    main()
