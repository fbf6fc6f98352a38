"""What the benchmarks measure with: a wrong table would look like any other."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("rich")


def benchmark(name):
    """A module of benchmarks/, which is no package; its folder on the path would hide a library named `datasets`."""
    path = Path(__file__).resolve().parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x, x.clone())
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


def test_variants_take_turns():
    order = []
    variants = {name: lambda name=name: order.append(name) for name in "abc"}
    measured = benchmark("interleaved").interleaved(variants, rounds=2, warmup=1, at_least=0.0)
    assert order == list("abcabcabc")
    assert {name: len(times) for name, times in measured.items()} == {"a": 2, "b": 2, "c": 2}


def test_a_short_call_is_repeated():
    calls = []
    measured = benchmark("interleaved").interleaved({"a": lambda: calls.append(1)}, rounds=1, warmup=1, at_least=0.1)
    assert len(calls) > 2
    assert len(measured["a"]) == 1


def test_ratios_are_those_of_the_same_round():
    measured = {"plain": [1.0, 10.0, 100.0], "slow": [2.0, 30.0, 400.0]}
    assert benchmark("interleaved").ratios(measured, "slow", "plain") == (2.5, 3.0, 3.5)


@pytest.mark.parametrize(
    ("loss", "tensors"),
    [
        (lambda x, weight: x * weight, 0),
        (lambda x, weight: weight.exp(), 1),
        (lambda x, weight: Square.apply(weight), 1),
        (lambda x, weight: weight.exp() + weight.exp().detach(), 1),
    ],
    ids=["what is there anyway is not counted", "a result", "a function of one's own", "a graph that is gone is not"],
)
def test_saved_bytes(loss, tensors):
    x, weight = torch.ones(100), nn.Parameter(torch.ones(100))
    assert benchmark("saved_tensors").saved_bytes(lambda: loss(x, weight).sum(), [x, weight]) == 400 * tensors
