"""Each private name of torch is still there and does what it is used for."""

import ast
import io
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


def test_a_state_dict_notes_the_versions_of_modules_and_buffers_that_it_does_not_hold_are_known():
    module = nn.Sequential(nn.BatchNorm1d(2))
    module[0].register_buffer("table", torch.ones(2), persistent=False)
    state_dict = module.state_dict()
    versions = torch_internals.module_versions(state_dict)
    assert versions["0"] == {"version": 2}
    assert torch_internals.module_versions({}) is None
    torch_internals.set_module_versions(state_dict, {"": {"version": 1}})
    assert torch_internals.module_versions(state_dict) == {"": {"version": 1}}
    assert torch_internals.non_persistent_buffers(module[0]) == {"table"}


def test_the_tensors_of_one_module_are_loaded_and_its_hooks_known():
    module, weight, found, errors = nn.Linear(2, 2), torch.ones(2, 2), ([], []), []
    torch_internals.load_own_tensors(module, {"a.weight": weight, "a.scale": weight}, "a.", {}, found, errors)
    assert module.weight.data_ptr() == weight.data_ptr()
    assert (found, errors) == ((["a.bias"], ["a.scale"]), [])
    torch_internals.load_own_tensors(module, {"bias": weight}, "", {}, ([], []), errors)
    assert len(errors) == 1
    hook = lambda module, found: None  # noqa: E731
    module.register_load_state_dict_post_hook(hook)
    assert torch_internals.load_post_hooks(module) == [hook]


def test_the_old_format_is_no_zip_archive():
    file = io.BytesIO()
    torch_internals.save_in_old_format({"a": torch.ones(2)}, file)
    assert not file.getvalue().startswith(b"PK")
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True)["a"], torch.ones(2))


def test_convolutions_have_one_base_and_activations_are_found_by_name():
    for layer in (nn.Conv1d(1, 1, 1), nn.ConvTranspose2d(1, 1, 1), nn.LazyConv3d(1, 1)):
        assert isinstance(layer, torch_internals.ConvNd)
    x = torch.randn(3)
    assert torch.equal(torch_internals.activation("gelu")(x), nn.GELU()(x))


PLACES = ("prediction", "training", "analysis", "deployment", "checkpoints", "cli", "model.py", "report.py")
ROOT = Path(bnnify.__file__).parent
FILES = [path for path in sorted(ROOT.rglob("*.py")) if path.relative_to(ROOT).parts[0] in PLACES]
# They are the registries of every module, and as good as public.
REGISTRIES = {"_parameters", "_buffers", "_modules"}


def defined_in_the_package():
    """The names of functions, classes and variables, and the attributes that an object sets of itself."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                yield node.name
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                yield from [node.attr] if ast.unparse(node.value) == "self" else []


OWN = set(defined_in_the_package())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_private_names_of_torch_stand_in_one_file(path):
    """Strings, such as the names that a pickle may have, are data."""
    used = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            used.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            used.update((*node.module.split("."), *(alias.name for alias in node.names)))
    private = {name for name in used if name.startswith("_") and not name.startswith("__")}
    assert private <= OWN | REGISTRIES
