"""The promises of a converted model as functions, for the test files that keep them over models of their own.

Each takes the original model, its inputs and the options for ``convert``; the inputs are in the model's dtype.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import zoo
from torch import nn

import bnnify
from bnnify.modules.computed_weights import detached_hook_weights
from bnnify.modules.parameters import bayesian_parameters, unique_bayesian_parameters


def call(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """One forward with the same dropout masks each time."""
    torch.manual_seed(7)
    return model(*inputs)


def drawn_network(bnn: bnnify.BayesianModel) -> nn.Module:
    """The plain model whose parameters are the samples of the draw in effect."""
    plain = bnnify.collapse(bnn)
    for parameter in bayesian_parameters(bnn.module):
        holder, _, attribute = parameter.name.rpartition(".")
        plain.get_submodule(holder)._parameters[attribute].data.copy_(getattr(parameter.module, attribute))
    return plain


Inputs = tuple[Any, ...]
Options = dict[str, Any]


def outside_a_draw_it_is_the_original(model: nn.Module, inputs: Inputs, options: Options) -> None:
    bnn = bnnify.convert(model, **options)
    bnn(*inputs)  # a draw leaves nothing behind but what a forward leaves in buffers
    for key, original in model.named_buffers():
        bnn.module.get_buffer(key).data.copy_(original)
    assert zoo.equal(call(bnn.module, inputs), call(model, inputs))


def a_draw_is_the_model_with_its_samples_as_parameters(model: nn.Module, inputs: Inputs, options: Options) -> None:
    bnn = bnnify.convert(model, **options)
    for _ in range(2):
        with bnn.draw():
            plain = drawn_network(bnn)
            output = call(bnn, inputs)[0]
        expected = call(plain, inputs)
        assert not zoo.equal(expected, call(bnnify.collapse(bnn), inputs))
        for found, wanted in zip(zoo.tensors(output), zoo.tensors(expected), strict=True):
            torch.testing.assert_close(found, wanted)


def as_sigma_vanishes_a_draw_is_the_original(model: nn.Module, inputs: Inputs, options: Options) -> None:
    bnn = bnnify.convert(model, **options | {"posterior_std": 1e-12})
    with bnn.draw():  # made before the seed of dropout is set
        output = call(bnn, inputs)[0]
    expected = call(model, inputs)
    assert type(output) is type(expected)
    for found, wanted in zip(zoo.tensors(output), zoo.tensors(expected), strict=True):
        torch.testing.assert_close(found, wanted)


def each_draw_is_another_network(model: nn.Module, inputs: Inputs, options: Options) -> None:
    bnn = bnnify.convert(model, **options)
    parameters = list(unique_bayesian_parameters(bnn.module))
    for training in (model.training, False):
        for module in bnn.modules():
            module.training = training
        with torch.set_grad_enabled(training):
            for noisy in parameters:
                for parameter in parameters:
                    parameter.rho.data.fill_(0.0 if parameter is noisy else -200.0)
                buffers = copy.deepcopy(list(bnn.buffers()))
                outputs = []
                for seed in (1, 2):
                    for buffer, before in zip(bnn.buffers(), buffers, strict=True):
                        buffer.data.copy_(before)
                    with torch.random.fork_rng():
                        torch.manual_seed(seed)
                        with bnn.draw():
                            outputs.append(call(bnn, inputs)[0])
                assert not zoo.equal(*outputs), noisy.name


def means_and_rhos_get_the_gradients_of_all_forwards(model: nn.Module, inputs: Inputs, options: Options) -> None:
    bnn = bnnify.convert(model, **options)
    sum(zoo.loss(bnn(*inputs)[0]) for _ in range(3)).backward()
    zoo.loss(model(*inputs)).backward()
    original = dict(model.named_parameters(remove_duplicate=False))
    for parameter in bayesian_parameters(bnn.module):
        assert original[parameter.name].grad is not None
        for gradient in (parameter.mean.grad, parameter.rho.grad):
            assert gradient is not None, parameter.name
            gradient = gradient.coalesce().values() if gradient.is_sparse else gradient
            assert gradient.isfinite().all(), parameter.name
            assert (gradient != 0).any(), parameter.name


def collapsing_gives_back_the_original(model: nn.Module, inputs: Inputs, options: Options) -> None:
    bnn = bnnify.convert(model, **options)
    plain = bnnify.collapse(bnn)
    copied = copy.deepcopy(model, detached_hook_weights(model))  # torch's copy of a graph lacks some attributes
    for module, original in zip(plain.modules(), copied.modules(), strict=True):
        assert type(module).__name__ == type(original).__name__
        assert "Bayesian" not in str(type(module).__mro__)
        assert vars(module).keys() == vars(original).keys()
    assert list(plain.state_dict()) == list(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), model.state_dict().values(), strict=True))
    assert zoo.equal(call(plain, inputs), call(model, inputs))


def copies_and_files_keep_the_posterior(model: nn.Module, inputs: Inputs, options: Options) -> None:
    bnn = bnnify.convert(model, **options)
    for parameter in bnn.parameters():
        parameter.data.add_(0.01 * parameter.requires_grad)  # as training does, which leaves the prior alone
    restored = bnnify.convert(model, **options)
    restored.load_state_dict(bnn.state_dict())
    with bnn.draw():
        copied = copy.deepcopy(bnn)
    expected = call(copy.deepcopy(bnn), inputs)
    for other in (copied, restored):
        found = call(other, inputs)
        assert zoo.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        assert not zoo.equal(other(*inputs)[0], other(*inputs)[0])


PROMISES: list[Callable[[nn.Module, Inputs, Options], None]] = [
    outside_a_draw_it_is_the_original,
    a_draw_is_the_model_with_its_samples_as_parameters,
    as_sigma_vanishes_a_draw_is_the_original,
    each_draw_is_another_network,
    means_and_rhos_get_the_gradients_of_all_forwards,
    collapsing_gives_back_the_original,
    copies_and_files_keep_the_posterior,
]
