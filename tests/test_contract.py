"""The promises of a converted model, each kept over the whole zoo."""

import copy
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo
from torch import nn

import bnnify
from bnnify.distributions.gaussian import std
from bnnify.draws.companions import COMPANIONS
from bnnify.modules.parameters import bayesian_parameters, unique_bayesian_parameters
from bnnify.modules.settings import settings_of

every_model = pytest.mark.parametrize("name", zoo.ZOO)
SILENT = -200.0  # a rho for which softplus underflows: sigma is zero


def converted(name: str, **options: object) -> tuple[nn.Module, bnnify.BayesianModel, tuple]:
    model, inputs = zoo.build(name)
    return model, bnnify.convert(model, **options), inputs


def in_double(inputs: tuple) -> tuple:
    return tuple(x.double() if x.is_floating_point() else x for x in inputs)


@every_model
def test_outside_a_draw_it_is_the_original_bit_for_bit_and_touches_no_random_numbers(name):
    model, bnn, inputs = converted(name)
    expected = copy.deepcopy(model)(*inputs)
    before = torch.get_rng_state()
    assert zoo.equal(bnn.module(*inputs), expected)
    assert torch.equal(torch.get_rng_state(), before)


@every_model
def test_the_original_model_is_left_as_it_was(name):
    model, inputs = zoo.build(name)
    classes = [type(module) for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    bnnify.convert(model)(*inputs)
    assert [type(module) for module in model.modules()] == classes
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@every_model
def test_as_sigma_vanishes_a_draw_is_the_original(name):
    model, bnn, inputs = converted(name, posterior_std=1e-12)
    expected, (output, _) = model(*inputs), bnn(*inputs)
    for found, wanted in zip(zoo.tensors(output), zoo.tensors(expected), strict=True):
        torch.testing.assert_close(found, wanted)
    assert type(output) is type(expected)


@every_model
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
def test_every_parameter_that_influences_the_output_does_so_at_random(name, mode):
    _, bnn, inputs = converted(name)
    bnn.train(mode == "train")
    parameters = list(unique_bayesian_parameters(bnn.module))
    assert parameters
    for parameter in parameters:
        parameter.rho.data.fill_(SILENT)
    with torch.set_grad_enabled(mode != "no_grad"):
        still = bnn.module(*inputs)
        assert zoo.equal(bnn(*inputs)[0], bnn(*inputs)[0])
        for parameter in parameters:
            original = parameter.mean.data.clone()
            parameter.mean.data.add_(0.5 * torch.randn_like(original))
            influences = not zoo.equal(bnn.module(*inputs), still)
            parameter.mean.data.copy_(original)
            parameter.rho.data.fill_(0.0)
            draws = bnn(*inputs)[0], bnn(*inputs)[0]
            parameter.rho.data.fill_(SILENT)
            assert zoo.equal(*draws) != influences, parameter.name


@every_model
def test_kl_is_the_sum_over_unique_parameters_and_the_same_in_every_draw(name):
    _, bnn, inputs = converted(name, prior=bnnify.Gaussian(0.1, 0.7), posterior_std=bnnify.Relative(0.3))
    expected = torch.zeros((), dtype=torch.float64)
    for parameter in {id(p.mean): p for p in bayesian_parameters(bnn.module)}.values():
        posterior = torch.distributions.Normal(parameter.mean.double(), std(parameter.rho.double()))
        expected += torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.1, 0.7)).sum()
    for kl in (bnn(*inputs)[1], bnn(*inputs)[1], bnn.kl()):
        torch.testing.assert_close(kl.double(), expected, rtol=1e-5, atol=1e-5)


@every_model
def test_a_fresh_conversion_has_no_kl_under_the_default_prior(name):
    _, bnn, _ = converted(name)
    weights = sum(p.mean.numel() for p in unique_bayesian_parameters(bnn.module))
    assert abs(bnn.kl().item()) < weights * 1e-6


@every_model
def test_means_and_rhos_get_gradients_where_the_original_does(name):
    model, bnn, inputs = converted(name)
    zoo.loss(model(*inputs)).backward()
    output, _ = bnn(*inputs)
    zoo.loss(output).backward()
    for parameter in bayesian_parameters(bnn.module):
        original = model.get_parameter(parameter.name)
        for gradient in (parameter.mean.grad, parameter.rho.grad):
            assert (gradient is not None) == (original.grad is not None), parameter.name
            assert gradient is None or gradient.isfinite().all(), parameter.name
        if original.grad is not None:
            assert (parameter.rho.grad != 0).any() == (original.grad.abs().sum() > 0) or name == "residual_block"


@every_model
def test_several_forwards_before_one_backward_give_the_mean_of_their_gradients(name):
    model, inputs = zoo.build(name)
    if name != "bfloat16":  # in double precision, nothing but a wrong gradient makes a difference
        model, inputs = model.double(), in_double(inputs)
    bnn = bnnify.convert(model)

    def gradients(seeds: list[int]) -> list[torch.Tensor]:
        bnn.zero_grad()
        total = 0.0
        for seed in seeds:
            torch.manual_seed(seed)
            total = total + zoo.loss(bnn(*inputs)[0]) / len(seeds)
        total.backward()
        return [p.grad.double() for p in bnn.parameters() if p.grad is not None]

    bnn.eval()
    together = gradients([1, 2, 3])
    apart = [torch.stack(same).mean(0) for same in zip(*(gradients([seed]) for seed in (1, 2, 3)), strict=True)]
    tolerance = {"rtol": 0.05, "atol": 0.05} if name == "bfloat16" else {"rtol": 1e-9, "atol": 1e-10}
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("name", sorted(set(zoo.ZOO) - {"bfloat16"}))
def test_gradients_agree_with_finite_differences_over_several_draws(name):
    model, inputs = zoo.build(name)
    inputs = in_double(inputs)
    bnn = bnnify.convert(model.double().eval())

    def objective() -> torch.Tensor:
        torch.manual_seed(3)
        return sum(zoo.loss(bnn(*inputs)[0]) for _ in range(2)) + bnn.kl()

    objective().backward()
    generator = torch.Generator().manual_seed(0)
    for parameter in unique_bayesian_parameters(bnn.module):
        for leaf in (parameter.mean, parameter.rho):
            if not leaf.requires_grad:
                continue
            direction = torch.randn(leaf.shape, dtype=leaf.dtype, generator=generator)
            direction /= direction.norm()
            step, sides = 1e-5, []
            for side in (1, -1):
                with torch.no_grad():
                    leaf.add_(side * step * direction)
                    sides.append(objective())
                    leaf.sub_(side * step * direction)
            numeric = (sides[0] - sides[1]) / (2 * step)
            torch.testing.assert_close((leaf.grad * direction).sum(), numeric, rtol=1e-4, atol=1e-5)


@every_model
def test_collapse_gives_back_the_original_bit_for_bit(name):
    model, bnn, inputs = converted(name)
    plain = bnnify.collapse(bnn)
    assert [type(module) for module in plain.modules()] == [type(module) for module in model.modules()]
    assert list(plain.state_dict()) == list(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), model.state_dict().values(), strict=True))
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in model.named_parameters()]  # ties too
    assert zoo.equal(plain(*inputs), model(*inputs))
    assert repr(plain) == repr(model)
    for module, original in zip(plain.modules(), model.modules(), strict=True):
        assert vars(module).keys() == vars(original).keys()


@every_model
def test_every_module_still_is_an_instance_of_its_class_with_its_keys_and_flags(name):
    model, bnn, _ = converted(name)
    for module, original in zip(bnn.module.modules(), model.modules(), strict=True):
        assert isinstance(module, type(original))
        assert module.training == original.training
    added = {
        f"{name}.{attribute}{suffix}".removeprefix(".")
        for name, module in bnn.module.named_modules(remove_duplicate=False)
        for attribute in settings_of(module)
        for suffix in COMPANIONS
    }
    state = bnn.module.state_dict()
    assert state.keys() - added == model.state_dict().keys()
    assert added <= state.keys()
    for key, parameter in model.named_parameters():
        found = bnn.module.get_parameter(key)
        assert (found.dtype, found.device, found.requires_grad) == (
            parameter.dtype,
            parameter.device,
            parameter.requires_grad,
        )


@every_model
def test_in_place_conversion_keeps_the_very_same_parameters(name):
    model, _ = zoo.build(name)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    bnn = bnnify.convert(model, inplace=True)
    assert bnn.module is model
    assert all(model.get_parameter(key) is parameter for key, parameter in parameters.items())


@every_model
def test_the_original_state_dict_loads(name):
    model, bnn, inputs = converted(name)
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    bnnify.load_weights(bnn, model.state_dict())
    bnn.eval()
    assert zoo.equal(bnn.module(*inputs), model.eval()(*inputs))
    # Sigma and the prior follow the weights that were loaded, as if they had been there from the start.
    for ours, fresh in zip(
        bayesian_parameters(bnn.module), bayesian_parameters(bnnify.convert(model).module), strict=True
    ):
        assert torch.equal(ours.rho, fresh.rho)
        assert torch.equal(ours.prior_mean, fresh.prior_mean)
        assert torch.equal(ours.initial_std, fresh.initial_std)


def trained(name: str) -> tuple[bnnify.BayesianModel, tuple]:
    """A converted model that is no longer what conversion made of it."""
    _, bnn, inputs = converted(name)
    generator = torch.Generator().manual_seed(1)
    for parameter in bnn.parameters():
        if parameter.requires_grad:
            parameter.data.add_((0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))
    return bnn.eval(), inputs


def assert_same_posterior(one: bnnify.BayesianModel, other: bnnify.BayesianModel, inputs: tuple) -> None:
    assert torch.equal(one.kl(), other.kl())
    outputs = []
    for bnn in (one, other):
        torch.manual_seed(5)
        outputs.append(bnn(*inputs)[0])
    assert zoo.equal(*outputs)
    assert not zoo.equal(other(*inputs)[0], other(*inputs)[0])


@every_model
@pytest.mark.parametrize("inside_a_draw", [False, True])
def test_deepcopy_and_pickle_keep_the_posterior_and_carry_no_draw(name, inside_a_draw):
    bnn, inputs = trained(name)
    if inside_a_draw:
        with bnn.draw():
            copies = [copy.deepcopy(bnn), pickle.loads(pickle.dumps(bnn))]
    else:
        copies = [copy.deepcopy(bnn), pickle.loads(pickle.dumps(bnn))]
    for other in copies:
        assert zoo.equal(other.module(*inputs), bnn.module(*inputs))
        assert_same_posterior(bnn, other, inputs)
        assert not {p.data_ptr() for p in bnn.parameters()} & {p.data_ptr() for p in other.parameters()}


@every_model
def test_state_dict_round_trips_under_weights_only(name):
    bnn, inputs = trained(name)
    file = io.BytesIO()
    torch.save(bnn.state_dict(), file)
    file.seek(0)
    _, other, _ = converted(name)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same_posterior(bnn, other.eval(), inputs)


@every_model
def test_save_and_load_round_trip(name, tmp_path):
    bnn, inputs = trained(name)
    bnnify.save(bnn, tmp_path / "model.bnn.pt")
    fresh = zoo.ZOO[name].build()  # other weights than the ones that were saved
    assert_same_posterior(bnn, bnnify.load(tmp_path / "model.bnn.pt", fresh).eval(), inputs)
    assert [path.name for path in tmp_path.iterdir()] == ["model.bnn.pt"]


def test_a_pickle_is_read_in_a_fresh_process(tmp_path):
    expected = {}
    for name in zoo.ZOO:
        bnn, inputs = trained(name)
        torch.save({"bnn": bnn, "inputs": inputs}, tmp_path / name)
        torch.manual_seed(5)
        expected[name] = [tensor.tolist() for tensor in zoo.tensors(bnn(*inputs)[0])]
    script = (
        "import json, sys, torch, zoo\n"
        "torch.set_num_threads(1)\n"
        "found = {}\n"
        "for name in zoo.ZOO:\n"
        "    saved = torch.load(f'{sys.argv[1]}/{name}', weights_only=False)\n"
        "    torch.manual_seed(5)\n"
        "    output = saved['bnn'](*saved['inputs'])[0]\n"
        "    found[name] = [tensor.tolist() for tensor in zoo.tensors(output)]\n"
        "print(json.dumps(found))\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout.splitlines()[-1]) == expected


@every_model
def test_repr_shows_estimator_and_prior(name):
    _, bnn, _ = converted(name)
    text = repr(bnn)
    assert "Bayesian" in text
    assert "reparameterization" in text
    assert "Pretrained" in text


@every_model
def test_hooks_survive_and_see_the_draw(name):
    model, inputs = zoo.build(name)
    seen = []
    for module in model.modules():
        module.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    model(*inputs)
    calls, seen[:] = list(seen), []
    bnn = bnnify.convert(model)
    bnn(*inputs)
    assert [call.removeprefix("Bayesian") for call in seen] == calls


@every_model
def test_training_moves_means_and_rhos_and_leaves_the_prior_alone(name):
    _, bnn, inputs = converted(name)
    before = copy.deepcopy(bnn)
    optimizer = torch.optim.Adam(bnn.parameter_groups(lr=1e-2, rho_lr=1e-2, weight_decay=0.1))
    for _ in range(2):
        optimizer.zero_grad()
        output, kl = bnn(*inputs)
        bnnify.elbo(zoo.loss(output), kl, num_data=100).backward()
        optimizer.step()
    pairs = zip(unique_bayesian_parameters(bnn.module), unique_bayesian_parameters(before.module), strict=True)
    for now, then in pairs:
        assert not torch.equal(now.mean, then.mean)
        assert not torch.equal(now.rho, then.rho)
        assert torch.equal(now.prior_mean, then.prior_mean)
    frozen = [key for key, parameter in before.module.named_parameters() if not parameter.requires_grad]
    for key in frozen:
        assert torch.equal(bnn.module.get_parameter(key), before.module.get_parameter(key))
