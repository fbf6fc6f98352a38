"""Fine-tunes a Bayesian network by the ELBO with Ray Train, which starts the workers itself, and resumes.

python examples/ray_train.py --checkpoint /a/folder/that/all/nodes/see --workers 2
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ray.train.torch import TorchTrainer, prepare_data_loader, prepare_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bnnify
from bnnify.cli.demo import load_digits


def train_on_one_worker(options: dict[str, Any]) -> None:
    torch.manual_seed(0)  # on all workers alike: they draw different networks all the same
    network, train, test = load_digits()
    bnn = bnnify.convert(network, prior=bnnify.Gaussian(std=1.0))  # first convert, then prepare
    model = prepare_model(bnn)
    bnn = getattr(model, "module", model)
    optimizer = torch.optim.Adam(bnn.parameter_groups(lr=3e-3, rho_lr=1e-2))
    loader = prepare_data_loader(DataLoader(TensorDataset(train.images, train.labels), batch_size=25, shuffle=True))

    rank, workers = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    first = 0
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            state = torch.load(Path(folder) / "state.pt", map_location="cpu", weights_only=True)
            bnn.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(torch.load(Path(folder) / f"random numbers of {rank}.pt", weights_only=True))
            first = state["epoch"]
    for epoch in range(first, options["epochs"]):
        if workers > 1:
            loader.sampler.set_epoch(epoch)
        for images, labels in loader:
            logits, kl = model(images)
            # N is the size of the whole training set, and not of the part that this worker sees.
            loss = bnnify.elbo(F.cross_entropy(logits, labels), kl, num_data=len(train.labels))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(bnn.parameters(), 10.0)
            optimizer.step()
        with tempfile.TemporaryDirectory() as folder:  # what the workers put there, Ray gathers into one checkpoint
            torch.save(torch.get_rng_state(), Path(folder) / f"random numbers of {rank}.pt")
            if rank == 0:
                state = {"model": bnn.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
                torch.save(state, Path(folder) / "state.pt")
            ray.train.report({"epoch": epoch + 1}, checkpoint=ray.train.Checkpoint.from_directory(folder))

    if rank == 0:
        device = next(bnn.parameters()).device
        probabilities = bnn.predict(test.images.to(device), 16, likelihood="logits").mean.cpu()
        print(f"NLL on {len(test.labels)} test digits: {F.nll_loss(probabilities.log(), test.labels):.3f}")
        bnnify.save(bnn, options["folder"] / "model.bnn.pt")
    dist.barrier()  # no worker leaves while another still needs it


def main() -> None:
    options = _options()
    folder = options.checkpoint.resolve()  # which workers have to know that are started elsewhere
    trainer = TorchTrainer(
        train_on_one_worker,
        train_loop_config={"folder": folder, "epochs": options.epochs},
        scaling_config=ray.train.ScalingConfig(num_workers=options.workers, use_gpu=torch.cuda.is_available()),
        # A run of this name that was stopped goes on from its last checkpoint.
        run_config=ray.train.RunConfig(name="digits", storage_path=str(folder)),
    )
    trainer.fit()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="the folder where to stop and resume")
    parser.add_argument("--workers", type=int, default=2, help="default: 2")
    parser.add_argument("--epochs", type=int, default=20, help="default: 20")
    return parser.parse_args()


if __name__ == "__main__":
    main()
