"""Several processes predict together: each runs a share of the networks, of the data, or of both."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import bnnify
from bnnify.prediction.averages import AVERAGES

from ..processes import needs_processes, on_every_rank

pytestmark = needs_processes


def model(seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4))
        return bnnify.convert(network, posterior_std=0.5, **options)


def examples(number=23):
    return torch.randn(number, 5, generator=torch.Generator().manual_seed(1))


def sharded_loader(x, **options):
    return DataLoader(TensorDataset(x), 4, sampler=DistributedSampler(TensorDataset(x), **options))


def assert_equal(found, expected, exactly):
    options = {"rtol": 0, "atol": 0} if exactly else {}
    assert (found.num_samples, found.class_dim) == (expected.num_samples, expected.class_dim)
    for name in (*AVERAGES, "mutual_information"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), **options, msg=name)
        if getattr(found, name) is not None:
            for other in on_every_rank(getattr(found, name)):
                assert torch.equal(other, getattr(found, name))


LIKELIHOODS = {
    "logits": {"likelihood": "logits"},
    "values": {},
    "noise of the data": {"likelihood": "gaussian", "output": lambda out: (out[:, :2], out[:, 2:].exp())},
    "pairs": {"likelihood": "logits", "antithetic": True},
}


def every_way_to_split_gives_the_prediction_of_one_process(rank, ranks):
    bnn, x, group = model(), examples(), dist.group.WORLD
    for options in LIKELIHOODS.values():
        for number in 1, 2, 3, 7:
            exactly = number <= (2 if options.get("antithetic") else 1)  # there is nothing to split but batches
            options = {**options, "seed": 3, "num_samples": number}
            expected = bnn.predict(x, **options)
            assert_equal(bnn.predict(x, **options, group=group), expected, exactly)
            batches = [*x.split(4)]  # more than ranks, and the last one shorter
            assert_equal(bnn.predict(iter(batches), **options, group=group), bnn.predict(batches, **options), exactly)
            assert_equal(bnn.predict([x], **options, group=group), expected, exactly)
            for shuffle in False, True:
                assert_equal(bnn.predict(sharded_loader(x, shuffle=shuffle), **options, group=group), expected, False)
    of_one = DataLoader(x, 1)
    loader = DataLoader(x, 1, sampler=DistributedSampler(x, shuffle=False))
    assert_equal(bnn.predict(loader, 5, seed=1, group=group), bnn.predict(of_one, 5, seed=1), exactly=True)
    halves = sharded_loader(x, num_replicas=ranks // 2, rank=rank // 2)  # two ranks for each half of the data
    assert_equal(bnn.predict(halves, 5, seed=1, group=group), bnn.predict(x, 5, seed=1), exactly=False)
    few = sharded_loader(x[:1])  # all but one of the ranks have nothing but a copy
    assert_equal(bnn.predict(few, 2, seed=1, group=group), bnn.predict(x[:1], 2, seed=1), exactly=True)
    image = {"likelihood": "logits", "class_dim": 1, "output": lambda out: out[:, :, None, None].expand(-1, -1, 2, 3)}
    assert_equal(bnn.predict(x, 4, seed=1, group=group, **image), bnn.predict(x, 4, seed=1, **image), exactly=False)
    total = {"output": lambda out: out.sum()}
    assert_equal(bnn.predict(x, 4, seed=1, group=group, **total), bnn.predict(x, 4, seed=1, **total), exactly=False)


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_way_to_split_gives_the_prediction_of_one_process(in_processes, ranks):
    in_processes(every_way_to_split_gives_the_prediction_of_one_process, ranks, ranks=ranks)


def networks_are_split_and_not_run_by_all(rank):
    bnn, calls = model(), []
    bnn.module.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    bnn.predict([*examples().split(4)], 8, group=dist.group.WORLD)
    assert len(calls) == 6 * 4
    calls.clear()
    bnn.predict(sharded_loader(examples()), 8, group=dist.group.WORLD)
    assert sum(calls) == 12 * 8
    calls.clear()
    bnn.predict([*examples().split(4)], 1, group=dist.group.WORLD)
    assert len(calls) == 3
    torch.manual_seed(rank)
    torch.testing.assert_close(*on_every_rank(bnn.predict(examples(), 8, group=dist.group.WORLD).mean), rtol=0, atol=0)


def the_closed_form_splits_the_data_alone(rank):
    bnn, x = model(select="2"), examples()
    for likelihood in "values", "logits":
        options = {"seed": 1, "likelihood": likelihood, "closed_form": True}
        batches = [*x.split(4)]
        for each in iter(batches), sharded_loader(x, shuffle=False):
            found = bnn.predict(each, group=dist.group.WORLD, **options)
            if likelihood == "values" or not isinstance(each, DataLoader):
                assert_equal(found, bnn.predict(batches, **options), exactly=not isinstance(each, DataLoader))


def what_cannot_be_split_is_refused_on_every_rank(rank):
    bnn, x, group = model(), examples(), dist.group.WORLD
    with pytest.raises(bnnify.ArgumentError, match="different data"):
        bnn.predict(x[rank:], 4, group=group)
    with pytest.raises(bnnify.ArgumentError, match="different data"):
        bnn.predict((batch for batch in sharded_loader(x)), 4, group=group)
    with pytest.raises(bnnify.ArgumentError, match=r"different arguments.*seed: \[0, 1\]"):
        bnn.predict(x, 4, seed=rank, group=group)
    with pytest.raises(bnnify.ArgumentError, match="leaves out 1 of 23"):
        bnn.predict(sharded_loader(x, drop_last=True), 4, group=group)
    with pytest.raises(bnnify.ArgumentError, match=r"the parts \[0, 0\] of 2"):
        bnn.predict(sharded_loader(x, num_replicas=2, rank=0), 4, group=group)
    short = DataLoader(x, 5, sampler=DistributedSampler(x), drop_last=True)
    with pytest.raises(bnnify.ArgumentError, match="has to count the examples, which are 12"):
        bnn.predict(short, 4, group=group)
    with pytest.raises(bnnify.ArgumentError, match="without batches"):
        bnn.predict([], 4, group=group)
    with pytest.raises(bnnify.ArgumentError if rank else bnnify.DrawError, match="returned integers"):
        bnn.predict(x, 4, group=group, output=lambda out: out.argmax(-1) if rank else out)
    with pytest.raises(bnnify.ArgumentError, match=r"\(23, 4\), \(23, 3\)"):
        bnn.predict(x, 4, group=group, output=lambda out: out[:, : 4 - rank])
    with pytest.raises(bnnify.ArgumentTypeError, match="process group"):
        bnn.predict(x, 4, group=rank)
    split = copy.deepcopy(bnn)
    parallelize_module(split.module[0], init_device_mesh("cpu", (2,)), ColwiseParallel())
    with pytest.raises(bnnify.ArgumentError, match="tensor parallelism"):
        split.predict(x, 4, group=group)


def a_sharded_model_predicts_for_data_that_are_split(rank):
    bnn, x = model(), examples()
    fully_shard(bnn.module, mesh=init_device_mesh("cpu", (2,)))
    expected = bnn.predict(x, 4, seed=1, likelihood="logits")
    found = bnn.predict(sharded_loader(x), 4, seed=1, likelihood="logits", group=dist.group.WORLD)
    assert_equal(found, expected, exactly=False)
    with pytest.raises(bnnify.ArgumentError, match="DistributedSampler"):
        bnn.predict(x, 4, group=dist.group.WORLD)


@pytest.mark.parametrize(
    "what",
    [
        networks_are_split_and_not_run_by_all,
        the_closed_form_splits_the_data_alone,
        what_cannot_be_split_is_refused_on_every_rank,
        a_sharded_model_predicts_for_data_that_are_split,
    ],
    ids=lambda what: what.__name__,
)
def test_each_holds_in_two_processes(what, in_processes):
    in_processes(what)
