"""Several processes train one Bayesian model: DDP, FSDP2 and distributed checkpoints, on CPU with gloo."""

import copy
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import bnnify
from bnnify.draws.companions import INITIAL_STD, PRIOR_MEAN, RHO
from bnnify.modules.parameters import unique_bayesian_parameters

from ..processes import RANKS, assert_same_on_every_rank, full, needs_processes, on_every_rank

pytestmark = needs_processes

CERTAIN = 1e-12
"""A σ below the spacing of float32 around the weights: every draw is the network of the means."""


class Block(nn.TransformerEncoderLayer):
    """Has a parent that reads the weight of its child, in the attention."""

    checkpointed = False

    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False) if self.checkpointed else super().forward(x)


def network(seed=0):
    """A few layers, of few shapes, for FSDP is slow to start on each; no number of rows divides by that of ranks."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        block = Block(5, nhead=1, dim_feedforward=5, dropout=0.0, batch_first=True)
        return nn.Sequential(nn.Linear(5, 5), block, nn.Linear(5, 5))


def convert(posterior_std=CERTAIN, prior=None):
    return bnnify.convert(network(), posterior_std=posterior_std, prior=prior or bnnify.Gaussian(std=0.5))


def joint_batch():
    return torch.randn(2 * RANKS, 4, 5, generator=torch.Generator().manual_seed(1))


def batch_of(rank):
    return joint_batch()[2 * rank : 2 * (rank + 1)]


def objective(bnn, x, forwards=1):
    losses = []
    for _ in range(forwards):
        output, kl = bnn(x)
        losses.append(bnnify.elbo(output.square().mean(), kl, num_data=100))
    return torch.stack(losses).mean()


def gradients(module):
    return {name: full(p.grad) for name, p in module.named_parameters() if p.requires_grad}


def averaged(gradients):
    for grad in gradients.values():
        dist.all_reduce(grad)
        grad /= dist.get_world_size()
    return gradients


def assert_gradients_close(actual, expected):
    assert any(name.endswith("_rho") for name in expected)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def mesh_of(*shape, names=("replicate", "shard")):
    return init_device_mesh("cpu", shape, mesh_dim_names=names[-len(shape) :])


def shard(bnn, root="module", mesh=None, **options):
    """FSDP2 as usual: on every layer, and on the root, which keeps what is left over (here the last layer)."""
    mesh = mesh or mesh_of(dist.get_world_size())
    for layer in bnn.module[:-1]:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(bnn.module if root == "module" else bnn, mesh=mesh, **options)
    return bnn


# DDP


def ddp_gives_the_gradient_of_the_joint_batch(rank):
    for forwards in 1, 2:
        reference, bnn = convert(), convert()
        objective(reference, joint_batch()).backward()
        parallel = DistributedDataParallel(bnn)
        objective(parallel, batch_of(rank), forwards).backward()
        assert_gradients_close(gradients(bnn), gradients(reference))


def ddp_averages_the_gradients_of_the_draws_of_all_ranks(rank):
    alone = convert(posterior_std=0.1)
    bnn = copy.deepcopy(alone)
    parallel = DistributedDataParallel(bnn)
    for model in parallel, alone:
        torch.manual_seed(rank)
        objective(model, batch_of(rank), forwards=2).backward()
    for grad in gradients(bnn).values():
        assert grad.isfinite().all()
        assert_same_on_every_rank(grad)
    assert_gradients_close(gradients(bnn), averaged(gradients(alone)))


class ReentrantBlocks(nn.Module):
    """Two layers, of which re-entrant checkpointing runs the first again, and the second twice, if it is told so."""

    def __init__(self, checkpointed):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)
        self.checkpointed = checkpointed

    def forward(self, x):
        for layer in self.first, self.second, self.second:
            x = checkpoint(layer, x, use_reentrant=True).tanh() if self.checkpointed else layer(x).tanh()
        return self.last(x)


def ddp_takes_reentrant_checkpointing_without_a_static_graph(rank):
    def converted(checkpointed, prior):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return bnnify.convert(ReentrantBlocks(checkpointed), posterior_std=0.1, prior=prior)

    mixture = bnnify.ScaleMixture()  # its KL is one of the draw, and differs between ranks
    for prior, with_kl in (bnnify.Pretrained(), True), (bnnify.Gaussian(), False), (mixture, True):
        alone, bnn = converted(False, prior), converted(True, prior)
        parallel = DistributedDataParallel(bnn)
        for step in range(3):
            for model in alone, parallel:
                torch.manual_seed(step)
                model.zero_grad()
                output, kl = model(batch_of(rank).requires_grad_())
                (output.square().mean() + kl / 100 if with_kl else output.square().mean()).backward()
            assert_gradients_close(gradients(bnn), averaged(gradients(alone)))


# FSDP2


def ddp_sends_the_prior_of_the_first_rank_to_all(rank):
    bnn = bnnify.convert(network(seed=rank))  # as where only the first rank has read the pretrained weights
    with torch.no_grad():
        for parameter in unique_bayesian_parameters(bnn.module):
            parameter.rho.add_(1.0)
    DistributedDataParallel(bnn)
    for tensor in (*bnn.parameters(), *bnn.buffers(), bnn.kl()):
        assert_same_on_every_rank(tensor)


def ddp_trains_a_model_that_was_unfrozen_and_not_its_prior(rank):
    bnn = bnnify.convert(network(), posterior_std=CERTAIN)
    bnn.requires_grad_(False)
    bnn.requires_grad_(True)
    parallel = DistributedDataParallel(bnn)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1, weight_decay=0.1)
    priors = [p.prior_mean.clone() for p in unique_bayesian_parameters(bnn)]
    for _ in range(3):  # from the second step on DDP would wait for a gradient that never comes
        optimizer.zero_grad()
        objective(parallel, batch_of(rank)).backward()
        optimizer.step()
    for parameter, before in zip(unique_bayesian_parameters(bnn), priors, strict=True):
        assert torch.equal(parameter.prior_mean, before)


def noise_of(layer, bnn, seed):
    """Epsilon of one draw of ``layer.weight``, and of one forward that its estimator makes."""
    torch.manual_seed(seed)
    mean = layer.weight
    with bnn.draw():
        drawn = ((layer.weight - mean) / 0.1).detach()
    output = bnn(torch.eye(mean.shape[1]))[0].detach() - bnn.module(torch.eye(mean.shape[1])).detach()
    return drawn, output


def assert_independent(first, second):
    assert abs(torch.stack([first.flatten(), second.flatten()]).corrcoef()[0, 1]) < 0.06


def ranks_with_data_of_their_own_draw_independent_noise_whatever_the_seeds(rank):
    for estimator in "reparameterization", "local", "flipout":
        layer = nn.Linear(64, 64, bias=False)
        bnn = bnnify.convert(nn.Sequential(layer), posterior_std=0.1, estimator=estimator)
        for seed in 0, rank:
            mine = noise_of(bnn.module[0], bnn, seed)
            for each in mine:
                assert_independent(*on_every_rank(each))
            for again, each in zip(noise_of(bnn.module[0], bnn, seed), mine, strict=True):
                assert torch.equal(again, each)
        torch.manual_seed(0)
        x = torch.eye(64)
        for made in bnn.predict(x, 2).mean, bnnify.freeze(bnn, 2)(x)[0]:
            assert_independent(*(each - bnn.module(x).detach() for each in on_every_rank(made)))
        assert_same_on_every_rank(bnn.predict(x, 2, seed=0).mean)  # networks that the caller has named


def compiled_models_draw_independent_noise_whatever_the_seeds(rank):
    x = torch.eye(64)
    for estimator in "reparameterization", "flipout":
        bnn = bnnify.convert(nn.Linear(64, 64, bias=False), posterior_std=0.1, estimator=estimator)
        compiled = torch.compile(bnn, fullgraph=True, backend="aot_eager")
        for seed in 0, rank:
            torch.manual_seed(seed)
            first, second = ((compiled(x)[0] - bnn.module(x)).detach() for _ in range(2))
            assert_independent(*on_every_rank(first))
            assert_independent(first, second)
            torch.manual_seed(seed)
            assert torch.equal((compiled(x)[0] - bnn.module(x)).detach(), first)
        compiled(x)[0].square().sum().backward()
        assert bnn.module.weight_rho.grad.isfinite().all()


def several_forwards_under_ddp_may_precede_one_backward(rank):
    """Buffers are sent around before each forward, and a backward of the one before may still be to come."""
    bnn = bnnify.convert(network().bfloat16())
    parallel = DistributedDataParallel(bnn)
    objective(parallel, batch_of(rank).bfloat16(), forwards=2).backward()
    assert all(p.grad.isfinite().all() for p in bnn.parameters() if p.requires_grad)


def fsdp_default_prior(rank, unfrozen):
    reference, bnn = bnnify.convert(network()), bnnify.convert(network())
    for each in (reference, bnn):
        with torch.no_grad():
            for parameter in unique_bayesian_parameters(each.module):
                parameter.rho.add_(1.0)
                parameter.mean.add_(0.01)
    shard(bnn)
    if unfrozen:
        bnn.requires_grad_(True)
    torch.testing.assert_close(bnn.kl(), reference.kl())
    for each in (reference, bnn):
        each.kl().backward()
    expected = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    torch.testing.assert_close({n: full(p.grad) for n, p in bnn.named_parameters() if p.grad is not None}, expected)
    grouped = {id(p) for group in bnn.parameter_groups(lr=0.1) for p in group["params"]}
    assert not grouped & {id(p) for name, p in bnn.named_parameters() if name.endswith("_prior_mean")}


@pytest.mark.parametrize("unfrozen", [False, True])
def test_a_sharded_model_has_the_prior_that_it_was_converted_with(in_processes, unfrozen):
    in_processes(fsdp_default_prior, unfrozen)


def fsdp_joint_batch(rank, root):
    reference = convert()
    objective(reference, joint_batch()).backward()
    for reshard_after_forward, forwards in itertools.product((True, False), (1, 2)):
        bnn = shard(convert(), root, reshard_after_forward=reshard_after_forward)
        with torch.no_grad():
            bnn(batch_of(rank))  # a validation step, after which FSDP may leave gathered parameters in place
        for requires_grad in False, True:
            objective(bnn, batch_of(rank).requires_grad_(requires_grad), forwards).backward()
            assert_gradients_close(gradients(bnn), gradients(reference))
            bnn.zero_grad()


@pytest.mark.parametrize("root", ["module", "bnn"])
def test_fsdp_gives_the_gradient_of_the_joint_batch(in_processes, root):
    in_processes(fsdp_joint_batch, root)


def every_rank_computes_with_the_full_form_of_one_sharded_sample(rank):
    torch.manual_seed(rank)
    bnn = shard(convert(posterior_std=0.1))
    layer, seen = bnn.module[0], []
    layer.register_forward_pre_hook(lambda *_: seen.append(layer.weight))
    with bnn.draw():
        sample = layer.weight
        bnn(batch_of(rank))
    assert isinstance(sample, DTensor)
    assert sample.placements == layer.weight.placements == (Shard(0),)
    assert type(seen[0]) is torch.Tensor
    assert torch.equal(seen[0], sample.full_tensor())
    assert_same_on_every_rank(seen[0])
    assert not torch.equal(seen[0], layer.weight.full_tensor())
    assert_same_on_every_rank(bnn.predict(joint_batch(), num_samples=2).mean)


def fsdp_one_draw(rank, checkpointed):
    torch.manual_seed(rank)
    bnn = shard(convert(posterior_std=0.1))
    bnn.module[1].checkpointed = checkpointed
    with bnn.draw():
        weights = {name: full(read_in_place(bnn.module, name)).detach() for name in network().state_dict()}
        output = bnn.module(batch_of(rank))
    output.square().mean().backward()

    leaves = {name: full(p.detach()).requires_grad_(p.requires_grad) for name, p in bnn.module.named_parameters()}
    for name, sample in weights.items():
        mean, rho = leaves[name], leaves.get(f"{name}_rho")
        noise = 0.0 if rho is None else ((sample - mean) / F.softplus(rho)).detach()
        weights[name] = mean if rho is None else mean + F.softplus(rho) * noise
    torch.func.functional_call(network(), weights, joint_batch()).square().mean().backward()
    expected = {name: leaf.grad for name, leaf in leaves.items()}
    assert_gradients_close(gradients(bnn.module), expected)


def read_in_place(root, name):
    module, _, attribute = name.rpartition(".")
    return getattr(root.get_submodule(module), attribute)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_fsdp_gives_the_gradient_of_one_drawn_network_on_the_joint_batch(in_processes, checkpointed):
    in_processes(fsdp_one_draw, checkpointed)


def shards_never_share_their_noise_whatever_the_seeds(rank):
    # Shards of one size, which equal noise would make equal.
    bnn = bnnify.convert(nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64)), posterior_std=0.1)
    for layer in bnn.module:
        fully_shard(layer, mesh=mesh_of(RANKS))
    layers = [(layer, layer.weight) for layer in bnn.module]

    def noise(seed):
        torch.manual_seed(seed)
        with bnn.draw():
            return torch.cat([((layer.weight - mean) / 0.1).detach().to_local().flatten() for layer, mean in layers])

    for seed in 0, rank:
        mine = noise(seed)
        together = torch.stack(on_every_rank(mine))
        assert abs(together.corrcoef()[0, 1]) < 0.05
        torch.testing.assert_close(together.mean(), torch.tensor(0.0), rtol=0, atol=0.05)
        torch.testing.assert_close(together.std(), torch.tensor(1.0), rtol=0, atol=0.05)
        halves = mine.view(2, -1)
        assert abs(halves.corrcoef()[0, 1]) < 0.05
        assert torch.equal(noise(seed), mine)
        assert not torch.equal(noise(seed + 7), mine)


def one_rank_draws_by_the_seed_alone(rank):
    bnn = bnnify.convert(nn.Sequential(nn.Linear(4, 4, bias=False)), posterior_std=0.1)
    fully_shard(bnn.module[0], mesh=mesh_of(1))
    torch.manual_seed(0)
    with bnn.draw():
        drawn = bnn.module[0].weight.to_local()
    torch.manual_seed(0)
    noise = torch.empty(4, 4).normal_(generator=torch.Generator().manual_seed(int(torch.randint(2**62, ()))))
    torch.testing.assert_close(drawn, bnn.module[0].weight.to_local() + 0.1 * noise)


def test_one_rank_draws_the_same_in_every_run(in_processes):
    in_processes(one_rank_draws_by_the_seed_alone, ranks=1)  # hash(None) is another in every run


def replicas_of_a_shard_share_their_noise_whatever_the_seeds(rank):
    torch.manual_seed(rank)
    bnn = shard(convert(posterior_std=0.1), mesh=mesh_of(RANKS, 1))
    with bnn.draw():
        assert_same_on_every_rank(bnn.module[0].weight.to_local())
    objective(bnn, batch_of(rank)).backward()
    for parameter in bnn.parameters():
        assert_same_on_every_rank(parameter.grad.to_local())


def parameters_gathered_before_the_draw_average_the_gradients_of_the_draws_of_all_ranks(rank):
    alone = convert(posterior_std=0.1)
    bnn = copy.deepcopy(alone)
    fully_shard(bnn, mesh=mesh_of(RANKS))
    optimizers = [torch.optim.SGD(model.parameter_groups(lr=0.1)) for model in (bnn, alone)]
    for step in range(2):
        for model in bnn, alone:
            torch.manual_seed(2 * step + rank)
            objective(model, batch_of(rank), forwards=2).backward()
        averaged(gradients(alone))
        assert_gradients_close(gradients(bnn), gradients(alone))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def fsdp_kl(rank, root):
    for prior in bnnify.Gaussian(std=0.5), bnnify.Pretrained(std=0.2):
        reference = convert(posterior_std=0.1, prior=prior)
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.add_(0.01 * parameter.requires_grad)
        bnn = shard(copy.deepcopy(reference), root)
        for kl in bnn.kl(), bnn(batch_of(rank))[1]:
            assert type(kl) is torch.Tensor
            torch.testing.assert_close(kl, reference.kl())
        for model in bnn, reference:
            model.kl().backward()
        assert_gradients_close(gradients(bnn), gradients(reference))


@pytest.mark.parametrize("root", ["module", "bnn"])
def test_the_kl_of_a_sharded_model_and_its_gradient_are_those_of_one_process(in_processes, root):
    in_processes(fsdp_kl, root)


def a_draw_and_a_kl_outside_the_forward_see_the_sharded_parameters_of_the_wrapper(rank):
    reference = convert(posterior_std=0.1)
    bnn = shard(convert(posterior_std=0.1), root="bnn")
    sharded = dict(bnn.named_parameters())
    with torch.no_grad(), bnn.draw():
        bnn(batch_of(rank))  # the first forward, in which FSDP sets itself up, and leaves what the root keeps gathered
    for model in bnn, reference:
        model.kl().backward()
    actual = {name: full(p.grad) for name, p in sharded.items() if p.requires_grad}
    assert_gradients_close(actual, gradients(reference))


def samples_follow_the_mixed_precision_of_fsdp(rank):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    bnn = shard(convert(posterior_std=0.1), mp_policy=policy)
    output, kl = bnn(batch_of(rank))
    assert output.dtype is torch.bfloat16
    assert kl.dtype is torch.float32
    (output.float().square().mean() + kl).backward()
    for grad in gradients(bnn).values():
        assert grad.dtype is torch.float32
        assert grad.isfinite().all()


class Adapted(nn.Module):
    """A linear layer in half precision that nothing trains, with an adapter in float32 beside it, as peft makes it."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(5, 5).bfloat16().requires_grad_(False)
        self.adapter = nn.Linear(5, 5)

    def forward(self, x):
        return self.base(x.bfloat16()).float() + self.adapter(x)


def adapters_over_a_sharded_base_in_half_precision(rank):
    torch.manual_seed(0)
    model = nn.Sequential(Adapted(), Adapted())
    reference, bnn = (bnnify.convert(model, posterior_std=CERTAIN) for _ in range(2))
    shard(bnn)
    objective(reference, joint_batch()).backward()
    objective(bnn, batch_of(rank)).backward()
    assert_gradients_close(gradients(bnn), gradients(reference))


def a_group_of_weights_in_half_precision_is_refused_by_fsdp(rank):
    """Their ρ are in float32. What FSDP is made for are parameters in float32, and mixed precision."""
    bnn = shard(bnnify.convert(network().bfloat16()))
    with pytest.raises(AssertionError, match="uniform original parameter dtype"):
        bnn(batch_of(rank).bfloat16())


def tensor_parallel(rank):
    def convert_mlp():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            mlp = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6))
        return bnnify.convert(mlp, posterior_std=CERTAIN, prior=bnnify.Gaussian(std=0.5))

    reference, bnn = convert_mlp(), convert_mlp()
    objective(reference, joint_batch()).backward()
    mesh = mesh_of(2, 2, names=("data", "tensor"))
    parallelize_module(bnn.module, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(bnn.module, mesh=mesh["data"])
    read, hooked = [], bnn.module[0]
    hooked.register_forward_pre_hook(lambda *_: read.append(hooked.weight))
    objective(bnn, batch_of(rank // 2)).backward()
    assert not isinstance(read[0], nn.Parameter)  # the mean is one, a sample is not
    assert_gradients_close(gradients(bnn), gradients(reference))


def ranks_that_compute_together_draw_the_same_and_others_do_not(rank):
    bnn = bnnify.convert(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64)), posterior_std=0.1)
    mesh = mesh_of(2, 2, names=("data", "tensor"))
    parallelize_module(bnn.module[2], mesh["tensor"], ColwiseParallel())
    outside = bnn.module[0]
    for seed in 0, rank:  # the second as our own recipes and many trainers do
        drawn, _ = noise_of(outside, bnn, seed)
        copies = on_every_rank(drawn)
        for first, second in itertools.combinations(range(4), 2):
            if first // 2 == second // 2:
                assert torch.equal(copies[first], copies[second])
            else:
                assert_independent(copies[first], copies[second])
        torch.manual_seed(seed)
        with bnn.draw():
            split = ((bnn.module[2].weight - network_mean(bnn, "2.weight")) / 0.1).detach().to_local()
        copies = on_every_rank(split)
        for first, second in itertools.combinations(range(4), 2):
            assert_independent(copies[first], copies[second])
    optimizer = torch.optim.SGD(bnn.parameters(), lr=0.1)
    torch.manual_seed(rank)
    for _ in range(2):
        optimizer.zero_grad()
        output, kl = bnn(joint_batch().view(-1, 1)[:6].expand(6, 64) * (1 + rank // 2))
        bnnify.elbo(output.square().mean(), kl, num_data=100).backward()
        optimizer.step()
    for replicated in outside.parameters():
        copies = on_every_rank(replicated.detach())
        assert torch.equal(copies[rank], copies[rank ^ 1])  # the other one of its tensor-parallel pair


class LooksAtAnother(nn.Module):
    """Uses a second converted model, which no rank shares, before its own layer."""

    def __init__(self):
        super().__init__()
        self.linear, self.other = nn.Linear(64, 64), [bnnify.convert(nn.Linear(2, 2))]

    def forward(self, x):
        self.other[0](torch.zeros(1, 2))
        return self.linear(x)


def noise_of_a_layer_is_that_of_its_own_draw(rank):
    for estimator in "local", "flipout":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            plain = nn.Sequential(LooksAtAnother(), nn.Linear(64, 64))
        bnn = bnnify.convert(plain, posterior_std=0.1, estimator={"0.*": estimator, "*": "reparameterization"})
        parallelize_module(bnn.module[1], mesh_of(2, names=("tensor",)), ColwiseParallel())
        bnn.module[0].register_forward_hook(lambda module, args, output: assert_same_on_every_rank(output.detach()))
        torch.manual_seed(rank)
        bnn(torch.eye(64))


def network_mean(bnn, name):
    return next(p.mean for p in unique_bayesian_parameters(bnn.module) if p.name == name)


def test_ranks_that_compute_together_draw_the_same_and_others_do_not(in_processes):
    in_processes(ranks_that_compute_together_draw_the_same_and_others_do_not, ranks=4)


def fsdp_divides_by_what_it_was_told(rank):
    reference, bnn = convert(), shard(convert())
    for module in bnn.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    for model, x in (reference, joint_batch()), (bnn, batch_of(rank)):
        output, kl = model(x)
        (output.square().sum() + kl / 100).backward()  # the KL counts once, whatever the divisor is
    assert_gradients_close(gradients(bnn), gradients(reference))


def tuning_under_tensor_parallelism_finds_one_factor_for_all_ranks(rank):
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6))
    x = torch.randn(30, 5)
    with torch.no_grad():
        data = [(x, torch.distributions.Categorical(logits=mlp(x)).sample())]
        mlp[2].weight *= 20
        mlp[2].bias *= 20
    reference, bnn = (bnnify.convert(mlp, posterior_std=0.02, prior=bnnify.Pretrained()) for _ in range(2))
    parallelize_module(bnn.module, mesh_of(2, names=("tensor",)), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    alone = bnnify.tune_std(reference, data, num_samples=32, likelihood="logits")
    tuned = bnnify.tune_std(bnn, data, num_samples=32, likelihood="logits")
    assert_same_on_every_rank(torch.tensor([tuned.factor, tuned.ratio]))
    assert tuned.ratio / tuned.factor == pytest.approx(alone.ratio / alone.factor, rel=1e-4)
    for shared in (bnn.module[0].weight_initial_std, bnn.module[2].weight_initial_std):
        assert_same_on_every_rank(full(shared))


def tuning_what_fsdp_has_sharded_is_refused_and_changes_nothing(rank):
    bnn = convert()
    shard(bnn)
    before = [full(parameter).clone() for parameter in bnn.parameters()]
    with pytest.raises(bnnify.ArgumentError, match="before fully_shard"):
        bnnify.tune_std(bnn, [joint_batch()], likelihood="logits", labels=False)
    assert all(torch.equal(full(parameter), old) for parameter, old in zip(bnn.parameters(), before, strict=True))


def test_fsdp_over_tensor_parallelism_reads_samples(in_processes):
    in_processes(tensor_parallel, ranks=4)


# Adapters on a sharded base


def llama_with_adapters(**options):
    import peft
    import transformers

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    # The usual initial weights have a B of zeros, through which no gradient reaches A.
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=11))
        return bnnify.convert(peft.get_peft_model(base, config), select="*.lora_*", **options).train()


def shard_base(bnn):
    adapters = {parameter for name, parameter in bnn.named_parameters() if ".lora_" in name}
    for module in (*bnn.module.base_model.model.model.layers, bnn.module):
        fully_shard(module, mesh=mesh_of(RANKS), ignored_params=adapters)
    return bnn


def backward(bnn, ids, seed):
    torch.manual_seed(seed)
    losses = []
    for _ in range(2):
        output, kl = bnn(ids)
        losses.append(bnnify.elbo(F.cross_entropy(output.logits[:, -1], ids[:, 0]), kl, num_data=100))
    torch.stack(losses).mean().backward()


def replicated_adapters(rank):
    ids = torch.arange(2 * RANKS * 3).view(-1, 3) % 11
    mine = ids[2 * rank : 2 * (rank + 1)]
    for checkpointed in False, True:
        reference = llama_with_adapters(posterior_std=CERTAIN)
        certain, alone, bnn = copy.deepcopy(reference), llama_with_adapters(), shard_base(llama_with_adapters())
        shard_base(certain)
        if checkpointed:
            bnn.module.gradient_checkpointing_enable()
            certain.module.gradient_checkpointing_enable()
        backward(reference, ids, seed=1)
        backward(certain, mine, seed=1)
        assert_gradients_close(averaged(gradients(certain)), gradients(reference))

        backward(alone, mine, seed=rank)
        backward(bnn, mine, seed=rank)  # a network for each rank, as under DDP
        assert_gradients_close(averaged(gradients(bnn)), averaged(gradients(alone)))
        torch.optim.Adam(bnn.parameter_groups(lr=0.01)).step()
        for parameter in unique_bayesian_parameters(bnn):
            for tensor in (parameter.mean, parameter.rho, parameter.prior_mean):
                assert type(tensor.data) is torch.Tensor
                assert_same_on_every_rank(tensor)


def saved_adapters(rank, path):
    bnn = shard_base(llama_with_adapters())
    means = {parameter.name: parameter.mean for parameter in unique_bayesian_parameters(bnn.module)}
    with torch.no_grad():
        for mean in means.values():
            mean.add_(0.1)
    state = llama_with_adapters().module.state_dict()
    dcp.save(bnn.module.state_dict(), checkpoint_id=path / "checkpoint")
    dcp.load(state, checkpoint_id=path / "checkpoint")
    for name, value in bnn.module.state_dict().items():
        assert torch.equal(state[name], full(value)), name

    if rank == 0:  # alone: nothing in it waits for the others
        bnnify.collapse(bnn, inplace=True).save_pretrained(path)
        loaded = bnnify.collapse(llama_with_adapters())
        loaded.load_adapter(path, "default")
        for name, mean in means.items():
            assert torch.equal(loaded.get_parameter(name), mean)


def test_adapters_that_fsdp_leaves_replicated_have_the_gradients_of_one_process(in_processes):
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    in_processes(replicated_adapters)


def test_replicated_adapters_are_saved_by_one_rank_and_the_whole_by_all(in_processes, tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    in_processes(saved_adapters, tmp_path)


# Files


def whole_file(rank, parallelize, path):
    bnn = bnnify.convert(network(), posterior_std=0.1)
    with torch.no_grad():
        bnn.module[0].weight.add_(0.1)
    if rank == 0:
        bnnify.save(bnn, path / "alone.pt")
    parallelize(bnn)
    bnn(batch_of(rank))  # after which FSDP may leave gathered parameters in place
    for name in "together.pt", "together.safetensors":
        bnnify.save(bnn, path / name)
        assert (path / name).exists()
        expected, found = (bnnify.load(path / each, network()) for each in ("alone.pt", name))
        torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)
        assert torch.equal(found.kl(), expected.kl())
    with pytest.raises(bnnify.CheckpointError, match="Cannot write"):
        bnnify.save(bnn, path / "no such folder" / "model.pt")


def shard_and_replicate(bnn):
    shard(bnn, mesh=mesh_of(RANKS, 1))


def split_one_layer(bnn):
    parallelize_module(bnn.module[0], mesh_of(RANKS, names=("tensor",)), ColwiseParallel(output_layouts=Replicate()))


@pytest.mark.parametrize("parallelize", [shard, shard_and_replicate, split_one_layer], ids=lambda each: each.__name__)
def test_a_sharded_model_is_saved_as_one_whole_file(in_processes, parallelize, tmp_path):
    in_processes(whole_file, parallelize, tmp_path)


# Checkpoints


def checkpoint_round_trip(rank, parallelize, path):
    def trained(seed):
        bnn = bnnify.convert(network(seed=seed))
        with torch.no_grad():
            for parameter in bnn.parameters():
                parameter.add_(0.01 * seed * parameter.requires_grad)
        parallelize(bnn)
        return bnn

    saved, loaded = trained(seed=1), trained(seed=2)
    state = saved.module.state_dict()
    added = [f"{entry.name}{suffix}" for entry in saved.report.bayesian for suffix in (RHO, PRIOR_MEAN, INITIAL_STD)]
    assert sorted(state) == sorted([*network().state_dict(), *added])
    dcp.save(state, checkpoint_id=path)
    state = loaded.module.state_dict()
    dcp.load(state, checkpoint_id=path)
    loaded.module.load_state_dict(state)
    for (name, expected), actual in zip(saved.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(full(actual), full(expected)), name
    torch.testing.assert_close(loaded.kl(), saved.kl())


@pytest.mark.parametrize("parallelize", [nn.Identity(), DistributedDataParallel, shard], ids=["plain", "ddp", "fsdp"])
def test_distributed_checkpoints_keep_the_original_keys_and_every_value(in_processes, parallelize, tmp_path):
    in_processes(checkpoint_round_trip, parallelize, tmp_path / "checkpoint")


def resharded_checkpoint(rank, path):
    saved = shard(convert(posterior_std=0.1))
    dcp.save(saved.module.state_dict(), checkpoint_id=path)
    plain = bnnify.convert(network(seed=1), posterior_std=0.2)
    state = plain.module.state_dict()
    dcp.load(
        {name: value for name, value in state.items() if not name.endswith((PRIOR_MEAN, INITIAL_STD))},
        checkpoint_id=path,
    )
    for name, value in saved.module.state_dict().items():
        assert torch.equal(state[name], full(value)), name


def test_a_sharded_checkpoint_loads_into_a_model_that_is_not_sharded(in_processes, tmp_path):
    in_processes(resharded_checkpoint, tmp_path / "checkpoint")


@pytest.mark.parametrize(
    "what",
    [
        ddp_gives_the_gradient_of_the_joint_batch,
        ddp_averages_the_gradients_of_the_draws_of_all_ranks,
        ddp_sends_the_prior_of_the_first_rank_to_all,
        ddp_takes_reentrant_checkpointing_without_a_static_graph,
        ddp_trains_a_model_that_was_unfrozen_and_not_its_prior,
        several_forwards_under_ddp_may_precede_one_backward,
        every_rank_computes_with_the_full_form_of_one_sharded_sample,
        shards_never_share_their_noise_whatever_the_seeds,
        replicas_of_a_shard_share_their_noise_whatever_the_seeds,
        parameters_gathered_before_the_draw_average_the_gradients_of_the_draws_of_all_ranks,
        a_draw_and_a_kl_outside_the_forward_see_the_sharded_parameters_of_the_wrapper,
        samples_follow_the_mixed_precision_of_fsdp,
        adapters_over_a_sharded_base_in_half_precision,
        a_group_of_weights_in_half_precision_is_refused_by_fsdp,
        tuning_under_tensor_parallelism_finds_one_factor_for_all_ranks,
        tuning_what_fsdp_has_sharded_is_refused_and_changes_nothing,
        ranks_with_data_of_their_own_draw_independent_noise_whatever_the_seeds,
        compiled_models_draw_independent_noise_whatever_the_seeds,
        fsdp_divides_by_what_it_was_told,
        noise_of_a_layer_is_that_of_its_own_draw,
    ],
    ids=lambda what: what.__name__,
)
def test_each_holds_in_two_processes(what, in_processes):
    in_processes(what)
