"""Each private name of torch is still there and does what it is used for."""

import io

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
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


@pytest.mark.parametrize(
    "tells",
    [
        lambda x: torch_internals.is_observed(),
        lambda x: torch_internals.in_transform(),
        torch_internals.is_transformed,
    ],
)
def test_a_transform_of_functions_and_its_tensors_are_seen_and_a_default_device_does_not_matter(tells):
    seen = []
    torch.func.vmap(lambda x: (seen.append(tells(x)), x)[1])(torch.ones(2))
    with torch.device("cpu"):
        seen.append(tells(torch.ones(2)))
    assert seen == [True, False]


def test_operators_tell_whether_they_draw_random_numbers():
    aten, x = torch.ops.aten, torch.ones(1, 1, 2, 2)
    draws = torch_internals.draws_random_numbers
    attention = aten._scaled_dot_product_flash_attention_for_cpu.default
    assert not draws(aten.add.Tensor, (x, x), {})
    assert draws(aten.randn.default, ([2],), {})
    assert draws(aten.bernoulli.p, (x, 0.0), {})  # which takes numbers from the generator
    assert [draws(aten.native_dropout.default, (x, 0.5, mode), {}) for mode in (True, False)] == [True, False]
    assert not draws(attention, (x, x, x), {})
    assert [draws(attention, (x, x, x, p), {}) for p in (0.1, 0.0)] == [True, False]
    assert draws(attention, (x, x, x), {"dropout_p": 0.1})


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


def test_a_module_without_attributes_of_its_own_has_the_state_of_every_module():
    assert vars(nn.Identity()).keys() == torch_internals.MODULE_STATE
    assert not vars(nn.ReLU()).keys() <= torch_internals.MODULE_STATE


def test_hooks_are_given_by_number_and_taken_off_by_it():
    module = nn.Linear(2, 2)
    before, after = module.register_forward_pre_hook(print), module.register_forward_hook(print)
    assert torch_internals.forward_pre_hooks(module) == {before.id: print}
    assert torch_internals.forward_hooks(module) == {after.id: print}
    del torch_internals.forward_hooks(module)[after.id]
    assert not torch_internals.forward_hooks(module)


def test_the_weight_that_pruning_computes_is_named():
    module = prune.l1_unstructured(nn.Linear(2, 2), "weight", amount=1)
    (hook,) = torch_internals.forward_pre_hooks(module).values()
    assert torch_internals.pruned_weight(hook) == "weight"


def test_recurrent_layers_name_what_they_read_and_read_what_they_hold():
    layer = nn.GRU(2, 3)
    names = torch_internals.flat_weight_names(layer)
    assert sorted(names) == sorted(layer.state_dict())
    layer.bias_hh_l0 = None
    layer.bias_hh_l0 = nn.Parameter(torch.zeros(9))
    setattr(layer, torch_internals.FLAT_WEIGHTS, [])
    torch_internals.init_flat_weights(layer)
    assert [id(weight) for weight in getattr(layer, torch_internals.FLAT_WEIGHTS)] == [
        id(getattr(layer, name)) for name in names
    ]


def test_convolutions_are_applied_with_other_weights_and_their_own_padding():
    layer, x = nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), torch.randn(1, 2, 5)
    assert torch.equal(torch_internals.convolve(layer, x, layer.weight, layer.bias), layer(x))
    assert not torch_internals.convolve(layer, x, 0 * layer.weight, None).any()
    transposed = nn.ConvTranspose2d(2, 3, 3, stride=2)
    assert list(torch_internals.output_padding(transposed, torch.ones(1, 2, 4, 4), [10, 9])) == [1, 0]


def test_the_methods_and_bases_of_layers_are_told():
    for layer in (nn.Linear, nn.Conv2d, nn.ConvTranspose2d):
        assert any(name in vars(layer) for name in torch_internals.FORWARD_METHODS)
    assert all(hasattr(nn.ConvTranspose2d, name) for name in torch_internals.FORWARD_METHODS)
    assert issubclass(nn.Conv2d, torch_internals.Convolution)
    assert not issubclass(nn.Conv2d, torch_internals.TransposedConvolution)
    assert issubclass(nn.ConvTranspose2d, torch_internals.TransposedConvolution)
    assert issubclass(nn.BatchNorm1d, torch_internals.BatchOrInstanceNorm)
    assert issubclass(nn.InstanceNorm1d, torch_internals.BatchOrInstanceNorm)
    assert type(nn.MultiheadAttention(2, 1).out_proj) is torch_internals.AttentionProjection


def test_operators_have_names_and_so_have_their_arguments():
    addmm = torch.ops.aten.addmm.default
    assert torch_internals.operator_name(addmm) == "addmm"
    assert torch_internals.operator_name(torch.add) == ""
    assert torch_internals.argument_names(addmm)[:3] == ["self", "mat1", "mat2"]


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


def test_compiled_and_scripted_modules_and_activations_have_the_names_by_which_they_are_known():
    made = torch.compile(nn.Linear(1, 1)), torch.jit.trace(nn.Linear(1, 1), torch.ones(1, 1))
    for module, name in zip(made, (torch_internals.OPTIMIZED_MODULE, torch_internals.SCRIPT_MODULE), strict=True):
        assert name in {f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__}
    assert torch.nn.functional.gelu.__module__ == torch_internals.ACTIVATIONS


def test_convolutions_have_one_base_and_activations_are_found_by_name():
    for layer in (nn.Conv1d(1, 1, 1), nn.ConvTranspose2d(1, 1, 1), nn.LazyConv3d(1, 1)):
        assert isinstance(layer, torch_internals.Convolution)
    x = torch.randn(3)
    assert torch.equal(torch_internals.activation("gelu")(x), nn.GELU()(x))


def test_what_was_written_to_is_known():
    tensor = torch.zeros(3)
    before = torch_internals.writes_to(tensor)
    tensor[1:].add_(1.0)  # by way of a view, which shares its memory
    assert torch_internals.writes_to(tensor) > before
    with torch.inference_mode():
        assert torch_internals.writes_to(torch.zeros(3)) == 0
