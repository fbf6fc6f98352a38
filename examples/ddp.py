"""Fine-tunes a Bayesian network by the ELBO on several processes, with DistributedDataParallel, and resumes.

    torchrun --nproc_per_node=2 examples/ddp.py --checkpoint ddp

Each process draws networks of its own, whatever the seed. `num_data` is the size of the whole training set: the mean
over the ranks of `nll + kl / num_data` is the ELBO per datum, since the KL is the same everywhere.
"""

import argparse
import contextlib
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import bnnify
from bnnify.cli.demo import load_digits


def main() -> None:
    options = _options()
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(0)
    network, train, test = load_digits()

    bnn = bnnify.convert(network, prior=bnnify.Gaussian(std=1.0)).to(device)  # first convert, then wrap
    model = DistributedDataParallel(bnn)
    model = torch.compile(model) if options.compile else model
    optimizer = torch.optim.Adam(bnn.parameter_groups(lr=3e-3, rho_lr=1e-2))
    # Means and ρ are averaged over the steps, and that is what predicts in the end.
    average = AveragedModel(bnn, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    data = TensorDataset(train.images, train.labels)
    sampler = DistributedSampler(data)
    loader = DataLoader(data, batch_size=25, sampler=sampler)

    first = len([*options.checkpoint.glob("epoch-*")])
    random_numbers = f"random numbers of {dist.get_rank()}.pt"  # which differ from rank to rank
    if first:
        last = options.checkpoint / f"epoch-{first}"
        state = torch.load(last / "state.pt", map_location=device, weights_only=True)
        bnn.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(torch.load(last / random_numbers, weights_only=True))
    for epoch in range(first, options.epochs):
        sampler.set_epoch(epoch)
        for number, (images, labels) in enumerate(loader, start=1):
            last = number % options.accumulate == 0 or number == len(loader)
            with contextlib.nullcontext() if last else model.no_sync():
                with torch.autocast(device.type, torch.bfloat16, enabled=options.bfloat16):
                    logits, kl = model(images.to(device))
                loss = bnnify.elbo(F.cross_entropy(logits.float(), labels.to(device)), kl, num_data=len(data))
                (loss / options.accumulate).backward()
            if last:
                torch.nn.utils.clip_grad_norm_(bnn.parameters(), 10.0)
                optimizer.step()
                optimizer.zero_grad()
                average.update_parameters(bnn)
        folder = options.checkpoint / f"epoch-{epoch + 1}"
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(torch.get_rng_state(), folder / random_numbers)
        if dist.get_rank() == 0:
            state = {"model": bnn.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, folder / "state.pt")
        dist.barrier()

    if dist.get_rank() == 0:
        probabilities = average.module.predict(test.images.to(device), 16, likelihood="logits").mean.cpu()
        print(f"NLL on {len(test.labels)} test digits: {F.nll_loss(probabilities.log(), test.labels):.3f}")
        bnnify.save(average.module, options.checkpoint / "model.bnn.pt")
    dist.barrier()  # no rank leaves while another still needs it
    dist.destroy_process_group()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="the folder where to stop and resume")
    parser.add_argument("--epochs", type=int, default=20, help="default: 20")
    parser.add_argument("--accumulate", type=int, default=1, help="batches to a step; default: 1")
    parser.add_argument("--bfloat16", action="store_true", help="compute in bfloat16 where autocast thinks it safe")
    parser.add_argument("--compile", action="store_true", help="compile the model")
    return parser.parse_args()


if __name__ == "__main__":
    main()
