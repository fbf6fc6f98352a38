"""Draws in backward passes: put back for the regions that activation checkpointing runs again, and for nothing else."""

import gc
import itertools
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import bnnify
from bnnify.modules.parameters import bayesian_parameters
from tests import zoo

X = torch.linspace(-1, 1, 12).reshape(3, 4)
LEAF = X.clone().requires_grad_()  # re-entrant checkpointing gives no gradient otherwise


def mlp(**options) -> bnnify.BayesianModel:
    torch.manual_seed(0)
    layers = [layer for _ in range(2) for layer in (nn.Linear(4, 4), nn.Tanh())]
    return bnnify.convert(nn.Sequential(*layers), **options)


class Recomputed(nn.Module):
    """Checkpointed blocks, nested in each other or with an output that is wrapped in ``structure``."""

    def __init__(self, use_reentrant: bool | None, structure: str = "tensor") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.3)) for _ in range(3))
        self.run, self.structure = zoo.Region(use_reentrant), structure

    def region(self, x):
        for block in self.blocks[:2]:
            x = x + (self.run(block, x) if self.structure == "nested" else block(x))
        return x

    def forward(self, x):
        x = self.run(self.region, torch.tanh(self.first(x)))
        x = self.run(self.blocks[2], x)
        # Nothing random is left after the last recomputed region: the output's own hooks have to be in time.
        return {
            "tensor": lambda: x,
            "nested": lambda: x,
            "dict": lambda: {"out": {"y": x}},
            "tuple": lambda: (x, [x.detach()]),
            "dataclass": lambda: zoo.Outputs(x, x.detach()),
            "object": lambda: zoo.PlainObject(x, x.detach()),
        }[self.structure]()


def gradients(bnn: bnnify.BayesianModel, how: str) -> list[torch.Tensor]:
    """Of three forwards and one backward."""
    bnn.zero_grad()
    losses = []
    for seed in range(3):
        torch.manual_seed(seed)
        if how == "draw":
            with bnn.draw():
                output = bnn.module(X)
        elif how == "forward_in_draw":
            with bnn.draw():
                output, _ = bnn(X)
        elif how == "sample":
            output = bnn.sample(X, num_samples=1)
        else:
            output, _ = bnn(X)
        losses.append(zoo.tensors(output)[0].square().sum() * (seed + 1))
    torch.stack(losses).sum().backward()
    return [p.grad for p in bnn.parameters() if p.requires_grad and p.grad is not None]


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(
    ("how", "structure"),
    [
        *itertools.product(["forward"], ["tensor", "nested", "dict", "tuple", "dataclass", "object"]),
        ("draw", "tensor"),
        ("draw", "object"),
        ("forward_in_draw", "tensor"),
        ("sample", "dict"),
    ],
)
def test_checkpointing_gives_the_gradients_of_no_checkpointing(use_reentrant, structure, how):
    expected = gradients(bnnify.convert(Recomputed(None, structure)), how)
    found = gradients(bnnify.convert(Recomputed(use_reentrant, structure)), how)
    assert len(expected) == len(found) == 16
    torch.testing.assert_close(found, expected)


class SharedInRegions(nn.Module):
    """A layer that two checkpointed regions use, which autograd therefore reaches more than once."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.shared = nn.Linear(4, 6), nn.Linear(6, 6)
        self.run = zoo.Region(use_reentrant)

    def forward(self, x):
        x = self.first(x)
        for _ in range(2):
            x = self.run(lambda x: torch.tanh(self.shared(x)), x)
        return x


@pytest.mark.parametrize("prior", [bnnify.Gaussian(std=0.1), bnnify.Laplace(), bnnify.ScaleMixture()], ids=str)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_layer_may_be_used_in_two_regions_and_in_the_kl(use_reentrant, prior):
    def gradients(use_reentrant):
        bnn = bnnify.convert(SharedInRegions(use_reentrant), prior=prior)
        losses = []
        for seed in range(2):
            torch.manual_seed(seed)
            output, kl = bnn(X)
            losses.append((seed + 1) * output.square().sum() + kl)
        sum(losses).backward()
        return [parameter.grad for parameter in bnn.parameters()]

    torch.testing.assert_close(gradients(use_reentrant), gradients(None))


def mean_gradient(model: nn.Module) -> torch.Tensor:
    model.zero_grad()
    torch.manual_seed(0)
    model(X).sum().backward()
    return model.first.weight.grad.clone() if hasattr(model, "first") else model[0].weight.grad.clone()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_backward_leaves_nothing_in_effect_even_when_it_fails(use_reentrant):
    bnn = bnnify.convert(Recomputed(use_reentrant))
    expected = mean_gradient(bnn.module)
    bnn(X)[0].sum().backward()
    assert torch.equal(mean_gradient(bnn.module), expected)

    output, _ = bnn(X)

    def fail(grad: torch.Tensor) -> None:
        raise RuntimeError("on purpose")

    handle = bnn.module.first.weight_rho.register_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        output.sum().backward()
    handle.remove()
    assert torch.equal(mean_gradient(bnn.module), expected)


class RecordsItsSamples(Recomputed):
    """Keeps weak references to what it reads, in a region that needs it again in backward."""

    def region(self, x):
        self.samples = weakref.WeakSet([self.blocks[0][0].weight, self.blocks[1][0].weight])
        return super().region(x)


def test_the_samples_are_freed_with_the_output():
    bnn = bnnify.convert(RecordsItsSamples(False))
    output, kl = bnn(X)
    samples = [weakref.ref(sample) for sample in bnn.module.samples]
    assert all(sample() is not None for sample in samples)
    (output.sum() + kl).backward()
    del output, kl
    gc.collect()
    assert [sample() for sample in samples] == [None] * len(samples)


def test_backward_may_run_in_another_thread():
    expected = gradients(bnnify.convert(Recomputed(None)), "forward")
    with ThreadPoolExecutor() as threads:
        found = threads.submit(gradients, bnnify.convert(Recomputed(False)), "forward").result()
    torch.testing.assert_close(found, expected)


def test_the_draw_of_another_thread_is_not_replayed():
    def gradient(use_reentrant: bool | None) -> torch.Tensor:
        bnn = bnnify.convert(Recomputed(use_reentrant))
        entered, done = threading.Event(), threading.Event()

        def draw_meanwhile() -> None:
            with bnn.draw():
                entered.set()
                done.wait(timeout=30)

        torch.manual_seed(1)
        with bnn.draw():
            other = threading.Thread(target=draw_meanwhile)
            other.start()
            entered.wait(timeout=30)
            torch.manual_seed(2)
            bnn.module(X).sum().backward()
            done.set()
            other.join()
        return bnn.module.first.weight_rho.grad

    torch.testing.assert_close(gradient(False), gradient(None))


# Several draws


def two_models(run):
    first, second = (mlp(posterior_std=1.0) for _ in range(2))
    with first.draw(), second.draw():
        output = second.module(run(lambda x: second.module(first.module(x)), LEAF))
    return output, [first, second]


def whole_and_part(run):
    whole = mlp(posterior_std=1.0)
    part = bnnify.convert(whole.module[0], inplace=True)
    with whole.draw(), part.draw():
        output = whole.module(run(whole.module, LEAF))
    return output, [whole]


class CallsAPart(nn.Module):
    def __init__(self, part: bnnify.BayesianModel, run) -> None:
        super().__init__()
        self.first, self.part, self.run = nn.Linear(4, 4), part, run

    def forward(self, x):
        return self.run(lambda x: torch.tanh(self.part(x)[0]), self.first(x))


def forward_of_a_part_in_that_of_the_whole(run):
    whole = bnnify.convert(CallsAPart(mlp(), run))
    return whole(X)[0], [whole]


def forward_in_a_draw(run):
    bnn = mlp(posterior_std=1.0)
    with bnn.draw():
        output = bnn.module(run(lambda x: bnn(x)[0], LEAF))
    return output, [bnn]


def two_forwards_in_one_region(run):
    bnn = mlp(posterior_std=1.0)
    return run(lambda x: bnn(bnn(x)[0])[0], LEAF), [bnn]


def draw_in_a_region(run):
    bnn = mlp(posterior_std=1.0)

    def region(x):
        with bnn.draw():
            return bnn.module(x)

    return run(region, LEAF), [bnn]


def draw_entered_around_each_step(run):
    bnn = mlp(posterior_std=1.0)
    draws, outputs = [bnn.draw(), bnn.draw()], []
    for step in range(4):
        with draws[step % 2]:
            outputs.append(bnn.module(run(bnn.module, LEAF * (step + 1))))
    return torch.cat(outputs), [bnn]


def the_network_itself_as_a_region(run):
    bnn = mlp(posterior_std=1.0)
    with bnn.draw():
        output = run(bnn.module, LEAF)
    return output, [bnn]


def a_part_alone(run):  # whose own outputs are hooked, and not those of the root
    bnn = bnnify.convert(nn.ModuleDict({"part": CallsAPart(mlp(), run)}))
    with bnn.draw():
        output = bnn.module["part"](X)
    return output, [bnn]


def inner_draw_that_is_left_first(run):
    whole = mlp(posterior_std=1.0)
    part = bnnify.convert(whole.module[0], inplace=True)
    with whole.draw():
        with part.draw():
            hidden = run(whole.module, LEAF)
        output = whole.module(hidden)
    return output, [whole]


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(
    "compute",
    [
        the_network_itself_as_a_region,
        a_part_alone,
        inner_draw_that_is_left_first,
        two_models,
        whole_and_part,
        forward_of_a_part_in_that_of_the_whole,
        forward_in_a_draw,
        two_forwards_in_one_region,
        draw_in_a_region,
        draw_entered_around_each_step,
    ],
)
def test_every_draw_around_a_region_is_replayed_and_no_other(compute, use_reentrant):
    def gradients(use_reentrant):
        torch.manual_seed(0)
        output, models = compute(zoo.Region(use_reentrant))
        output.square().sum().backward()
        return [p.grad for bnn in models for p in bnn.parameters() if p.requires_grad]

    torch.testing.assert_close(gradients(use_reentrant), gradients(None))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_two_losses_from_one_draw_may_have_a_backward_each(use_reentrant):
    def gradients(use_reentrant):
        bnn = bnnify.convert(Recomputed(use_reentrant))
        torch.manual_seed(1)
        with bnn.draw():
            losses = [bnn.module(scale * X).square().sum() for scale in (1, 2)]
        losses[0].backward(retain_graph=True)
        losses[1].backward()
        return [p.grad for p in bnn.parameters() if p.requires_grad]

    torch.testing.assert_close(gradients(use_reentrant), gradients(None))


# What is kept


@pytest.mark.parametrize("how", ["forward", "draw", "sample"])
def test_without_a_region_that_runs_again_nothing_is_kept_with_the_outputs(how):
    bnn = mlp()
    seen = []
    bnn.module[1].register_forward_hook(lambda module, args, output: seen.append(output))
    if how == "draw":
        with bnn.draw():
            seen.append(bnn.module(X))
    else:
        seen.append(bnn(X)[0] if how == "forward" else bnn.sample(X, num_samples=1))
    assert all(output.requires_grad and not output._backward_hooks for output in seen)


def floats_alive() -> int:
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, nn.Parameter)]
    return sum(tensor.numel() for tensor in tensors if tensor.is_floating_point())


@pytest.mark.parametrize(
    ("use_reentrant", "how", "estimator"),
    [
        *itertools.product([None, False, True], ["forward", "draw"], ["reparameterization"]),
        (False, "forward", "local"),
        (True, "forward", "flipout"),
    ],
)
def test_a_loss_that_is_logged_keeps_no_weights(use_reentrant, how, estimator):
    bnn = bnnify.convert(Recomputed(use_reentrant), estimator=estimator)
    logged, alive = torch.zeros(()), []
    for step in range(4):
        if how == "draw":
            with bnn.draw():
                output, kl = bnn.module(X), bnn.kl()
        else:
            output, kl = bnn(X)
        loss = output.square().mean() + 1e-3 * kl
        bnn.zero_grad()
        loss.backward()
        logged = logged + loss
        del output, kl, loss
        if step in (1, 3):
            alive.append(floats_alive())
    assert alive[1] - alive[0] < 20  # two losses, and no weights


# Hooks in a backward pass


@pytest.mark.parametrize("use_reentrant", [None, False, True])
@pytest.mark.parametrize("where", ["accumulated gradient", "gradient of a parameter", "gradient of an output"])
def test_what_a_hook_in_a_backward_pass_computes_is_no_recomputation(where, use_reentrant):
    def gradients(use_reentrant, hooked):
        bnn = bnnify.convert(Recomputed(use_reentrant)).eval()
        mean, expected_std = bnn.module(X).detach(), bnn.predict(X, 300).std.mean().item()
        checked = []

        @torch.set_grad_enabled(where == "accumulated gradient")
        def monitor(_):
            state = torch.get_rng_state()
            one, other = bnn(X)[0], bnn(X)[0]
            with bnn.draw():
                drawn, again = bnn.module(X), bnn(X)[0]
            assert not torch.allclose(one, other)
            assert torch.equal(drawn, again)
            assert torch.equal(bnn.module(X), mean)
            assert bnn.predict(X, 300).std.mean().item() == pytest.approx(expected_std, rel=0.3)
            torch.set_rng_state(state)
            checked.append(True)

        torch.manual_seed(1)
        output, kl = bnn(X)
        if hooked:
            parameters = [each.rho for each in bayesian_parameters(bnn.module)]
            if where == "gradient of an output":
                output.register_hook(monitor)
            for rho in parameters if where == "gradient of a parameter" else ():
                rho.register_hook(monitor)
            for rho in parameters if where == "accumulated gradient" else ():
                rho.register_post_accumulate_grad_hook(monitor)
        (output.square().sum() + kl).backward()
        assert bool(checked) == hooked
        return [p.grad for p in bnn.parameters() if p.requires_grad]

    torch.testing.assert_close(gradients(use_reentrant, True), gradients(None, False))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_hook_may_run_a_backward_pass_of_its_own(use_reentrant):
    def gradients(use_reentrant, hooked):
        bnn, other = (bnnify.convert(Recomputed(use_reentrant)) for _ in range(2))
        torch.manual_seed(1)
        output, _ = bnn(X)

        def train_another(_):
            state = torch.get_rng_state()
            with torch.enable_grad():
                other(X)[0].sum().backward()
            torch.set_rng_state(state)

        if hooked:
            output.register_hook(train_another)
        output.square().sum().backward()
        return [p.grad for p in bnn.parameters() if p.requires_grad]

    torch.testing.assert_close(gradients(use_reentrant, True), gradients(None, False))


class RunsAgainByItself(torch.autograd.Function):
    """Computes a layer without a graph, and again in backward: first without gradients, as invertible networks do."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.save_for_backward(x)
        ctx.layer = layer
        return layer(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        values = ctx.layer(x)
        with torch.enable_grad():
            output = ctx.layer(x)
        assert torch.equal(values, output)
        output.backward(grad)
        return x.grad, None


def test_a_function_that_runs_again_in_a_way_of_its_own_gets_its_draw_back():
    class Model(nn.Module):
        def __init__(self, by_itself: bool) -> None:
            torch.manual_seed(0)
            super().__init__()
            self.layer, self.by_itself = nn.Linear(4, 4), by_itself

        def forward(self, x):
            return torch.tanh(RunsAgainByItself.apply(x, self.layer) if self.by_itself else self.layer(x))

    def gradients(by_itself):
        bnn = bnnify.convert(Model(by_itself), posterior_std=1.0)
        torch.manual_seed(1)
        bnn(X.clone().requires_grad_())[0].square().sum().backward()
        return [p.grad for p in bnn.parameters() if p.requires_grad]

    torch.testing.assert_close(gradients(True), gradients(False))


# Threads


def test_backward_passes_in_several_threads_do_not_disturb_each_other():
    run = lambda block, x: checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)  # noqa: E731

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))

        def forward(self, x, checkpointed):
            for block in self.blocks:
                x = run(block, x) if checkpointed else block(x)
            return x

    bnn = bnnify.convert(Model(), posterior_std=1.0)
    rhos = [each.rho for each in bayesian_parameters(bnn.module)]
    end, lock = time.monotonic() + 2, threading.Lock()

    def train(_: int) -> None:
        while time.monotonic() < end:
            with lock, bnn.draw():  # under the lock, since both draw from one generator
                outputs = [bnn.module(X.clone().requires_grad_(), how) for how in (True, False)]
            found, expected = (
                torch.autograd.grad(output.square().sum(), rhos, retain_graph=True) for output in outputs
            )
            torch.testing.assert_close(found, expected)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(6) as threads:
            list(threads.map(train, range(6)))
    finally:
        sys.setswitchinterval(interval)
