"""Functions of tests that run in several processes, with gloo, and what they ask of one another."""

import datetime
import multiprocessing

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

RANKS = 2

needs_processes = pytest.mark.skipif(
    not dist.is_gloo_available() or "forkserver" not in multiprocessing.get_all_start_methods(),
    reason="needs gloo, and processes forked from a server",
)


@pytest.fixture
def in_processes(tmp_path):
    """Call a function of a test module in new processes, as ``function(rank, *arguments)``; fail where one fails."""

    def run(function, *arguments, ranks=RANKS):
        # They are forked from a server that has imported torch once. A file is their rendezvous: no port to collide.
        multiprocessing.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "bnnify"])
        torch.multiprocessing.start_processes(
            _process,
            (ranks, (tmp_path / "rendezvous").as_uri(), function, arguments),
            nprocs=ranks,
            daemon=True,
            start_method="forkserver",
        )

    return run


def _process(rank, ranks, rendezvous, function, arguments):
    torch.set_num_threads(1)
    torch.manual_seed(0)  # the ranks build the same model
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=ranks, timeout=limit)
    function(rank, *arguments)
    dist.barrier()
    dist.destroy_process_group()


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def on_every_rank(tensor):
    copies = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(copies, tensor.detach().contiguous())
    return copies


def assert_same_on_every_rank(tensor):
    for other in on_every_rank(tensor):
        assert torch.equal(other, tensor)
