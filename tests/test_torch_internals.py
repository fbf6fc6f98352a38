"""Each private name of torch is still there and does what it is used for."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import bnnify
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


def test_code_in_a_transform_of_functions_is_told_from_other_code():
    seen = []
    torch.func.vmap(lambda x: (seen.append(torch_internals.in_transform()), x)[1])(torch.ones(2))
    assert seen == [True]
    assert not torch_internals.in_transform()


def test_memory_is_shared_as_long_as_a_view_lives():
    tensor = torch.ones(2)
    assert not torch_internals.memory_is_shared(tensor)
    view = tensor[0]
    assert torch_internals.memory_is_shared(tensor)
    del view
    assert not torch_internals.memory_is_shared(tensor)


def test_hooks_and_compiled_forwards_of_modules_are_seen():
    module = nn.Linear(2, 2)
    for register, is_there in (
        (module.register_forward_hook, lambda: torch_internals.has_own_hooks(module)),
        (module.register_forward_pre_hook, lambda: torch_internals.has_own_hooks(module)),
        (nn.modules.module.register_module_forward_hook, torch_internals.has_global_hooks),
        (nn.modules.module.register_module_forward_pre_hook, torch_internals.has_global_hooks),
    ):
        assert not is_there()
        handle = register(lambda *args: None)
        assert is_there()
        handle.remove()
    assert not torch_internals.is_compiled(module)
    module.compile(backend="eager")
    assert torch_internals.is_compiled(module)


def test_trees_are_flattened_and_put_together_again():
    tree = {"a": [1, (2, 3)], "b": 4}
    leaves, structure = torch_internals.tree_flatten(tree)
    assert leaves == torch_internals.tree_leaves(tree) == [1, 2, 3, 4]
    assert torch_internals.tree_unflatten(leaves, structure) == tree
    assert torch_internals.tree_map(lambda leaf: 2 * leaf, tree) == {"a": [2, (4, 6)], "b": 8}


def test_a_dispatch_mode_sees_operations():
    class Counting(torch_internals.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += 1
            return func(*args, **(kwargs or {}))

    with Counting() as counting:
        torch.ones(2).add(1)
    assert counting.count == 2


PLACES = ("prediction", "training", "analysis", "deployment", "model.py", "report.py")
ROOT = Path(bnnify.__file__).parent


@pytest.mark.parametrize("place", PLACES)
def test_private_names_of_torch_stand_in_one_file(place):
    private = re.compile(
        r"\btorch(\.\w+)*\._[a-z]\w*|from torch(\.\w+)*\._\w+ import|from torch[\w.]* import .*\b_[a-z]", re.I
    )
    for path in [ROOT / place] if place.endswith(".py") else (ROOT / place).glob("*.py"):
        assert not private.findall(path.read_text()), path
