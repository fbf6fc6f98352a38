"""Each private name of torch is still there and does what it is used for."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from bnnify import torch_internals


class SomeFunctionMode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


OBSERVERS = {
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "a dispatch mode": lambda: FlopCounterMode(display=False),
    "a function mode": SomeFunctionMode,
}


@pytest.mark.parametrize("name", OBSERVERS)
def test_whoever_follows_what_torch_does_is_seen(name):
    assert not torch_internals.is_observed()
    with OBSERVERS[name]():
        assert torch_internals.is_observed()
    assert not torch_internals.is_observed()


def test_a_transform_of_functions_is_seen_and_a_default_device_does_not_matter():
    seen = []
    torch.func.vmap(lambda x: (seen.append(torch_internals.is_observed()), x)[1])(torch.ones(2))
    assert seen == [True]
    with torch.device("cpu"):
        assert not torch_internals.is_observed()


def test_a_tensor_of_a_transform_is_told_from_others():
    seen = []
    torch.func.vmap(lambda x: (seen.append(torch_internals.is_transformed(x)), x)[1])(torch.ones(2))
    assert seen == [True]
    assert not torch_internals.is_transformed(torch.ones(2))


def test_what_an_operator_writes_to_is_named():
    a, b = torch.ones(2), torch.ones(2)
    written = torch_internals.written_arguments
    assert written(torch.ops.aten.add.Tensor, (a, b), {}) == []
    (found,) = written(torch.ops.aten.add_.Tensor, (a, b), {})
    assert found is a
    (found,) = written(torch.ops.aten.add.out, (a, b), {"out": b})
    assert found is b


@pytest.mark.parametrize("training", [False, True])
def test_batch_normalisation_writes_its_statistics_in_training(training):
    mean, var = torch.zeros(2), torch.ones(2)
    args = (torch.ones(3, 2), None, None, mean, var, training, 0.1, 1e-5)
    found = torch_internals.written_arguments(torch.ops.aten.native_batch_norm.default, args, {})
    assert [id(each) for each in found] == ([id(mean), id(var)] if training else [])
