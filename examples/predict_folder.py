"""Predicts a folder of images with a Bayesian network on several processes, and writes a table of what it found.

    torchrun --nproc_per_node=2 examples/predict_folder.py images --model ddp/model.bnn.pt --table predictions.csv

The images are digits of 8×8 pixels, and the model is what `examples/ddp.py` writes. Each process reads its part of
the images; all of them get the averages, and the first one writes them.
"""

import argparse
import csv
import os
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler
from torchvision.transforms.functional import to_tensor

import bnnify
from bnnify.cli.demo import make_network


class Images(Dataset[torch.Tensor]):
    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.glob("*.png"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.files[index]) as image:
            return to_tensor(image.convert("L"))


def main() -> None:
    options = _options()
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    bnn = bnnify.load(options.model, make_network()).to(device)
    images = Images(options.folder)
    sampler = DistributedSampler(images, shuffle=False)
    loader = DataLoader(images, batch_size=64, sampler=sampler, num_workers=options.readers)

    # The networks are those of the seed, on any number of processes. What the sampler repeats, so that all processes
    # have equally many images, is left out again.
    found = bnn.predict(loader, options.networks, likelihood="logits", seed=0, group=dist.group.WORLD)

    if dist.get_rank() == 0:
        probabilities, classes = found.mean.max(1)
        with options.table.open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["image", "class", "probability", "mutual information"])
            columns = (column.tolist() for column in (classes, probabilities, found.mutual_information))
            table.writerows(zip((file.name for file in images.files), *columns, strict=True))
    dist.barrier()  # no rank leaves while another still needs it
    dist.destroy_process_group()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder of images")
    parser.add_argument("--model", type=Path, required=True, help="a file that bnnify.save has written")
    parser.add_argument("--table", type=Path, required=True, help="where to write")
    parser.add_argument("--networks", type=int, default=32, help="default: 32")
    parser.add_argument("--readers", type=int, default=0, help="processes that read images; default: 0")
    return parser.parse_args()


if __name__ == "__main__":
    main()
