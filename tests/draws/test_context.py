"""Draws belong to a context: a thread, a task, or a generator that is run in one; copies of a model carry none."""

import asyncio
import contextvars
import copy
import gc
import pickle
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import bnnify
from bnnify.modules.parameters import bayesian_parameters
from tests import zoo

X = torch.linspace(-1, 1, 12).reshape(3, 4)


@pytest.fixture
def bnn() -> bnnify.BayesianModel:
    torch.manual_seed(0)
    return bnnify.convert(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), posterior_std=1.0)


def assert_no_draw_is_in_effect(bnn: bnnify.BayesianModel) -> None:
    assert all(parameter.active.entry is None for parameter in bayesian_parameters(bnn.module))
    assert not any(module._forward_hooks for module in bnn.modules())
    assert torch.equal(bnn.module(X), bnnify.collapse(bnn)(X))
    assert not torch.equal(bnn(X)[0], bnn(X)[0])


def are_equal(outputs: list[Tensor]) -> bool:
    return all(torch.allclose(output, outputs[0]) for output in outputs)


def test_threads_have_draws_of_their_own(bnn):
    barrier, samples, stable = threading.Barrier(3), {}, []

    def work(index: int) -> None:
        with bnn.draw():
            samples[index] = bnn.module[0].weight.detach().clone()
            output = bnn.module(X)
            barrier.wait(timeout=30)
            stable.append(torch.equal(samples[index], bnn.module[0].weight) and torch.equal(output, bnn.module(X)))
            barrier.wait(timeout=30)

    with ThreadPoolExecutor() as threads:
        for index in range(2):
            threads.submit(work, index)
        barrier.wait(timeout=30)
        mean = bnn.module[0].weight  # both threads are inside their draws now
        barrier.wait(timeout=30)
    assert mean is bnn.module[0]._parameters["weight"]
    assert stable == [True, True]
    assert not torch.equal(samples[0], samples[1])


# Tasks


async def in_a_draw(bnn, forward, steps: int = 3) -> list[Tensor]:
    with bnn.draw():
        outputs = [bnn.module(X)]
        for _ in range(steps):
            await asyncio.sleep(0)
            outputs.append(forward(X))
    return outputs


async def outside_of_draws(forward, steps: int = 3) -> list[Tensor]:
    outputs = []
    for _ in range(steps):
        await asyncio.sleep(0)
        outputs.append(forward(X))
    return outputs


@pytest.mark.parametrize("compiled", [False, True])
def test_tasks_that_take_turns_have_draws_of_their_own(bnn, compiled):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    forward = torch.compile(bnn.module, fullgraph=True, backend=counter) if compiled else bnn.module
    mean = bnn.module(X)

    async def main():
        tasks = [in_a_draw(bnn, forward), outside_of_draws(forward), in_a_draw(bnn, forward, steps=5)]
        return await asyncio.gather(*tasks)

    first, outside, second = asyncio.run(main())
    assert are_equal(first)
    assert are_equal(second)
    assert not torch.allclose(first[0], second[0])
    assert are_equal([mean, *outside, forward(X)])
    assert counter.frame_count <= 3  # the mean, while others draw and when none does, and a draw
    assert_no_draw_is_in_effect(bnn)


def test_a_task_that_is_started_in_a_draw_keeps_it_when_its_parent_has_left(bnn):
    async def main():
        with bnn.draw():
            expected = bnn.module(X)
            task = asyncio.create_task(outside_of_draws(bnn.module))
            in_a_thread = await asyncio.to_thread(bnn.module, X)
        assert_no_draw_is_in_effect(bnn)
        return [expected, in_a_thread, *await task]

    assert are_equal(asyncio.run(main()))


def test_an_asynchronous_generator_that_is_abandoned_leaves_no_draw_in_effect(bnn):
    async def stream():
        with bnn.draw():
            while True:
                yield bnn.module(X)

    async def main():
        async for _ in stream():
            break
        gc.collect()
        await asyncio.sleep(0.01)  # another task closes it
        assert_no_draw_is_in_effect(bnn)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asyncio.run(main())


# Generators


def held_in_a_generator(bnn):
    with bnn.draw():
        while True:
            yield bnn.module(X)


def held_for_three_steps(bnn):
    with bnn.draw():
        for _ in range(3):
            yield bnn.module(X)


def entered_around_each_step(bnn):
    draw = bnn.draw()
    while True:
        with draw:
            output = bnn.module(X)
        yield output


def test_leaving_out_of_order_warns_and_takes_back_nothing_but_its_own(bnn):
    first, second = held_in_a_generator(bnn), held_in_a_generator(bnn)
    next(first)
    expected = next(second)
    with pytest.warns(RuntimeWarning, match="enter it around each step, `with draw:`"):
        first.close()
    assert torch.equal(bnn.module(X), expected)
    second.close()
    assert_no_draw_is_in_effect(bnn)


@pytest.mark.parametrize("make", [held_for_three_steps, entered_around_each_step])
def test_a_generator_whose_steps_run_in_a_thread_pool_keeps_its_draw_or_warns_that_it_has_not(bnn, make):
    async def main():
        generator = make(bnn)
        return [await asyncio.to_thread(next, generator, None) for _ in range(4)]  # each in a context of its own

    if make is held_for_three_steps:
        with pytest.warns(RuntimeWarning, match="enter it around each step, `with draw:`"):
            outputs = asyncio.run(main())
        assert not are_equal(outputs[:2])
        assert are_equal([*outputs[1:3], bnn.module(X)])
    else:
        assert are_equal(asyncio.run(main()))
    assert_no_draw_is_in_effect(bnn)


def test_generators_that_enter_their_draw_around_each_step_do_not_disturb_each_other(bnn):
    generators = [entered_around_each_step(bnn) for _ in range(3)]
    steps = []
    for _ in range(4):
        steps.append([next(generator) for generator in generators])
        assert_no_draw_is_in_effect(bnn)
    assert all(are_equal(list(outputs)) for outputs in zip(*steps, strict=True))
    assert not are_equal(steps[0])


@pytest.mark.parametrize("closed_in", ["its context", "another context", "another thread"])
def test_generators_that_are_run_in_contexts_of_their_own_do_not_disturb_each_other(bnn, closed_in):
    generators = [(contextvars.copy_context(), held_in_a_generator(bnn)) for _ in range(3)]
    steps = []
    for _ in range(4):
        steps.append([context.run(next, generator) for context, generator in generators])
        assert torch.equal(bnn.module(X), bnnify.collapse(bnn)(X))
    assert all(are_equal(list(outputs)) for outputs in zip(*steps, strict=True))
    assert not are_equal(steps[0])
    for context, generator in generators:
        if closed_in == "its context":
            context.run(generator.close)
        elif closed_in == "another context":
            generator.close()
        else:
            with ThreadPoolExecutor() as threads:
                threads.submit(generator.close).result()
        assert torch.equal(context.run(bnn.module, X), bnnify.collapse(bnn)(X))
    assert_no_draw_is_in_effect(bnn)


def test_one_draw_may_be_in_effect_in_several_threads_at_once(bnn):
    draw, barrier, found = bnn.draw(), threading.Barrier(2), {}

    def work(number: int) -> None:
        with draw:
            barrier.wait(timeout=30)
            first = bnn.module(X)
            if number == 0:
                barrier.wait(timeout=30)
        if number == 1:
            barrier.wait(timeout=30)
        found[number] = first, bnn.module(X)

    with ThreadPoolExecutor() as threads:
        list(threads.map(work, range(2)))
    assert are_equal([found[0][0], found[1][0]])
    assert are_equal([found[0][1], found[1][1], bnn.module(X)])
    assert_no_draw_is_in_effect(bnn)


# Compiled code, copies


def test_a_compiled_block_in_an_eager_region_gets_its_draw_back(bnn):
    class Blocks(nn.Module):
        def __init__(self, use_reentrant: bool | None) -> None:
            torch.manual_seed(0)
            super().__init__()
            self.first, self.block = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh())
            self.run = zoo.Region(use_reentrant)

        def forward(self, x):
            return self.run(self.block, self.first(x))

    def gradients(how: str, use_reentrant: bool | None) -> list[Tensor]:
        torch._dynamo.reset()
        bnn = bnnify.convert(Blocks(use_reentrant), posterior_std=1.0)
        if use_reentrant is not None:
            bnn.module.block.compile(fullgraph=True, backend="aot_eager")
        torch.manual_seed(1)
        with bnn.draw():
            output = bnn.module(X)
        if how == "forward":
            torch.manual_seed(1)
            output, _ = bnn(X)
        output.square().sum().backward()
        return [p.grad for p in bnn.parameters() if p.requires_grad]

    for how in ("draw", "forward"):
        expected = gradients(how, None)
        for use_reentrant in (False, True):
            torch.testing.assert_close(gradients(how, use_reentrant), expected)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))], ids=["copy", "pickle"]
)
def test_a_copy_made_inside_a_draw_carries_neither_the_draw_nor_a_hook(bnn, copied):
    with bnn.draw():
        whole, part = copied(bnn), copied(bnn.module)
        assert_no_draw_is_in_effect(whole)
        assert torch.equal(part(X), whole.module(X))
        assert not any(module._forward_hooks for module in part.modules())  # those of a part go with its first call
    assert_no_draw_is_in_effect(bnn)
