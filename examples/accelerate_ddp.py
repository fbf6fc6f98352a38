"""Fine-tunes a Bayesian network by the ELBO with accelerate, and resumes where it was stopped.

    accelerate launch --multi_gpu --num_processes=2 examples/accelerate_ddp.py --checkpoint accelerate

Without GPUs the same command starts two processes on the CPU. A part of the network is computed again in the backward
pass, by the re-entrant kind of activation checkpointing.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import bnnify
from bnnify.cli.demo import load_digits


class Checkpointed(nn.Module):
    """Runs a part of a model again in the backward pass, with the same sample, instead of keeping what it computed."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.part, x, use_reentrant=True) if self.training else self.part(x)


def main() -> None:
    options = _options()
    accelerator = Accelerator(
        gradient_accumulation_steps=options.accumulate,
        cpu=not torch.cuda.is_available(),
        mixed_precision="bf16" if options.bfloat16 else "no",
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),  # a batch order that resumes
    )
    set_seed(0)  # on all processes alike: they draw different networks all the same
    layers, train, test = load_digits()
    network = nn.Sequential(layers[:2], Checkpointed(layers[2:5]), layers[5:]).train()

    bnn = bnnify.convert(network, prior=bnnify.Gaussian(std=1.0))  # first convert, then prepare
    optimizer = torch.optim.Adam(bnn.parameter_groups(lr=3e-3, rho_lr=1e-2))
    loader = DataLoader(TensorDataset(train.images, train.labels), batch_size=25, shuffle=True)
    model, optimizer, loader = accelerator.prepare(bnn, optimizer, loader)

    first = len([*options.checkpoint.glob("epoch-*")])
    if first:  # weights, optimizer, and the state of the random numbers of each process
        accelerator.load_state(options.checkpoint / f"epoch-{first}")
    for epoch in range(first, options.epochs):
        loader.set_epoch(epoch)
        for images, labels in loader:
            with accelerator.accumulate(model):  # which averages the gradients over the processes once in a step
                logits, kl = model(images)
                # N is the size of the whole training set, and not of the part that this process sees.
                loss = bnnify.elbo(F.cross_entropy(logits.float(), labels), kl, num_data=len(train.labels))
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(bnn.parameters(), 10.0)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.save_state(options.checkpoint / f"epoch-{epoch + 1}")

    bnn = accelerator.unwrap_model(model)
    if accelerator.is_main_process:
        probabilities = bnn.predict(test.images.to(accelerator.device), 16, likelihood="logits").mean.cpu()
        print(f"NLL on {len(test.labels)} test digits: {F.nll_loss(probabilities.log(), test.labels):.3f}")
        bnnify.save(bnn, options.checkpoint / "model.bnn.pt")
    accelerator.wait_for_everyone()  # no process leaves while another still needs it
    accelerator.end_training()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="the folder where to stop and resume")
    parser.add_argument("--epochs", type=int, default=20, help="default: 20")
    parser.add_argument("--accumulate", type=int, default=1, help="batches to a step; default: 1")
    parser.add_argument("--bfloat16", action="store_true", help="compute in bfloat16 where autocast thinks it safe")
    return parser.parse_args()


if __name__ == "__main__":
    main()
