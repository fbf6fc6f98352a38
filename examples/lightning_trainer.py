"""Fine-tunes a Bayesian network by the ELBO with the Trainer of Lightning, whole or sharded, and resumes.

    torchrun --nproc_per_node=2 examples/lightning_trainer.py --checkpoint lightning --strategy ddp
    torchrun --nproc_per_node=2 examples/lightning_trainer.py --checkpoint lightning --strategy fsdp

The second shards with FSDP2, which Lightning calls ModelParallelStrategy; its FSDPStrategy is FSDP1.
"""

import argparse
import os
from pathlib import Path

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

import bnnify
from bnnify.cli.demo import load_digits


class Classifier(lightning.LightningModule):
    def __init__(self, bnn: bnnify.BayesianModel, num_data: int) -> None:
        super().__init__()
        self.bnn = bnn
        self.num_data = num_data  # the size of the whole training set, and not of the part that a process sees

    def on_train_batch_start(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        # Lightning does not save the state of the random numbers: so an epoch that is resumed draws what it would have
        # drawn. All processes are seeded alike, and draw different networks all the same.
        if batch_idx == 0:
            torch.manual_seed(self.current_epoch)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, labels = batch
        logits, kl = self.bnn(images)
        return bnnify.elbo(F.cross_entropy(logits.float(), labels), kl, num_data=self.num_data)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.bnn.parameter_groups(lr=3e-3, rho_lr=1e-2))


class ShardedClassifier(Classifier):
    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for layer in self.bnn.module:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.bnn.module, mesh=mesh)


def main() -> None:
    options = _options()
    network, train, test = load_digits()
    bnn = bnnify.convert(network.train(), prior=bnnify.Gaussian(std=1.0))
    processes, of_node = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    callbacks: list[lightning.Callback] = [ModelCheckpoint(options.checkpoint, filename="{epoch}", save_top_k=-1)]
    if options.strategy == "ddp":
        classifier, strategy = Classifier(bnn, len(train.labels)), "ddp"
        callbacks.append(EMAWeightAveraging(decay=0.9))  # of means and ρ, and that is what predicts in the end
    else:
        classifier, strategy = ShardedClassifier(bnn, len(train.labels)), ModelParallelStrategy(processes, 1)
    trainer = lightning.Trainer(
        devices=of_node,
        num_nodes=processes // of_node,
        strategy=strategy,
        callbacks=callbacks,
        max_epochs=options.epochs,
        accumulate_grad_batches=options.accumulate,
        gradient_clip_val=10.0,
        precision="bf16-mixed" if options.bfloat16 else "32-true",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = TensorDataset(train.images, train.labels)
    last = max(options.checkpoint.glob("*.ckpt"), key=os.path.getmtime, default=None)
    trainer.fit(classifier, DataLoader(data, batch_size=25, shuffle=True), ckpt_path=last)

    # All processes predict together, with the same networks and the same images: a sharded model needs them all.
    device = trainer.strategy.root_device
    bnn = classifier.bnn.to(device)
    probabilities = bnn.predict(test.images.to(device), 16, likelihood="logits", seed=0).mean.cpu()
    if trainer.is_global_zero or options.strategy == "fsdp":
        bnnify.save(bnn, options.checkpoint / "model.bnn.pt")
    if trainer.is_global_zero:
        print(f"NLL on {len(test.labels)} test digits: {F.nll_loss(probabilities.log(), test.labels):.3f}")
    trainer.strategy.barrier()  # no process leaves while another still needs it
    torch.distributed.destroy_process_group()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="the folder where to stop and resume")
    parser.add_argument("--strategy", choices=["ddp", "fsdp"], default="ddp", help="default: ddp")
    parser.add_argument("--epochs", type=int, default=20, help="default: 20")
    parser.add_argument("--accumulate", type=int, default=1, help="batches to a step; default: 1")
    parser.add_argument("--bfloat16", action="store_true", help="compute in bfloat16 where autocast thinks it safe")
    return parser.parse_args()


if __name__ == "__main__":
    main()
