"""Runs a program of examples/, and writes the noise that each of its ranks draws first.

It stands before the program on the command line: `torchrun … recorded_noise.py FOLDER PROGRAM ARGUMENTS`, or `python …`
for the program that starts its ranks itself.
"""

import runpy
import sys
from pathlib import Path


def record(folder):
    """Write the first 4,096 random numbers of this rank, or some more, to ``folder``."""
    import torch
    import torch.distributed as dist

    from bnnify.draws import noise

    drawn = []

    def recording(draw):
        def recorded(tensor, *arguments):
            made = draw(tensor, *arguments)
            if sum(part.numel() for part in drawn) < 4096:
                drawn.append((made.to_local() if hasattr(made, "to_local") else made).flatten())
                torch.save(torch.cat(drawn), folder / f"{dist.get_rank()}.pt")
            return made

        return recorded

    noise.standard_normal_ = recording(noise.standard_normal_)
    noise.sharded_noise = recording(noise.sharded_noise)


if __name__ == "__main__":
    folder, *sys.argv = Path(sys.argv[1]), *sys.argv[2:]
    if Path(sys.argv[0]).name == "ray_train.py":  # whose ranks are other processes
        import ray.train.torch

        ray.init(num_cpus=2, include_dashboard=False)
        trainer = ray.train.torch.TorchTrainer
        ray.train.torch.TorchTrainer = lambda train, **options: trainer(
            lambda config: (record(folder), train(config)), **options
        )
    else:
        record(folder)
    runpy.run_path(sys.argv[0], run_name="__main__")
