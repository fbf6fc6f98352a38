"""The promises of a converted model, each kept over the whole zoo."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bnnify
from bnnify.modules.parameters import bayesian_parameters, unique_bayesian_parameters
from tests import zoo
from tests.contract import CHECKS, Case, examine

PRIOR = {"prior": bnnify.Pretrained()}  # the default, which keeps its mean beside each weight


@pytest.mark.parametrize("name", zoo.ZOO)
def test_every_promise_is_kept(name):
    case = Case(name, lambda: zoo.build(name)[0], lambda model: (zoo.build(name)[1], {}), settings=PRIOR)
    found = list(examine(case))
    assert {outcome.check: outcome.detail for outcome in found if outcome.status != "pass"} == {}
    assert {outcome.check for outcome in found} == {"original", *CHECKS}


@pytest.mark.parametrize("name", sorted(set(zoo.ZOO) - {"bfloat16"}))
def test_gradients_agree_with_finite_differences_over_several_draws(name):
    model, inputs = zoo.build(name)
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    bnn = bnnify.convert(model.double().eval(), prior=bnnify.Gaussian(std=0.5))  # whose KL has a gradient

    def objective() -> torch.Tensor:
        torch.manual_seed(3)
        forwards = [bnn(*inputs) for _ in range(2)]
        return sum(zoo.loss(output) + kl for output, kl in forwards) + bnn.kl()

    objective().backward()
    generator = torch.Generator().manual_seed(0)
    for parameter in unique_bayesian_parameters(bnn.module):
        for leaf in (parameter.mean, parameter.rho):
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


def test_in_half_precision_too_several_forwards_before_one_backward_give_the_sum_of_their_gradients():
    model, inputs = zoo.build("bfloat16")
    bnn = bnnify.convert(model)

    def gradients(seeds: range) -> list[torch.Tensor]:
        losses = []
        for seed in seeds:
            torch.manual_seed(seed)
            losses.append(zoo.loss(bnn(*inputs)[0]))
        return torch.autograd.grad(sum(losses), [p for p in bnn.parameters() if p.requires_grad])

    apart = [gradients(range(seed, seed + 1)) for seed in range(3)]
    for together, *each in zip(gradients(range(3)), *apart, strict=True):
        terms = torch.stack(each).double()
        # Each sum of two is rounded once.
        bound = 2 * torch.finfo(torch.bfloat16).eps * terms.abs().sum(0)
        assert ((together.double() - terms.sum(0)).abs() <= bound).all()


@pytest.mark.parametrize("name", ["bfloat16", "lstm", "tied_language_model", "partly_frozen"])
def test_the_original_state_dict_loads_and_the_posterior_follows(name):
    model, inputs = zoo.build(name)
    bnn = bnnify.convert(model)
    for parameter in model.parameters():
        parameter.data.mul_(1.3)  # by which they look trained: 1.5 would lead to the bound of another initialisation
    bnnify.load_weights(bnn, model.state_dict())
    assert zoo.equal(bnn.module(*inputs), model(*inputs))
    # As if the weights that were loaded had been there from the start.
    fresh = bnnify.convert(model)
    for ours, theirs in zip(bayesian_parameters(bnn.module), bayesian_parameters(fresh.module), strict=True):
        for attribute in ("rho", "prior_mean", "initial_std"):
            assert torch.equal(getattr(ours, attribute), getattr(theirs, attribute))


@pytest.mark.parametrize("name", ["lstm", "tied_language_model", "partly_frozen", "checkpointed_reentrant"])
def test_training_moves_means_and_rhos_and_leaves_prior_and_frozen_parameters_alone(name):
    model, inputs = zoo.build(name)
    bnn = bnnify.convert(model)
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
    for key, parameter in before.module.named_parameters():
        assert parameter.requires_grad or torch.equal(bnn.module.get_parameter(key), parameter)


def test_a_pickle_is_read_in_a_fresh_process(tmp_path):
    expected = {}
    for name in zoo.ZOO:
        model, inputs = zoo.build(name)
        bnn = bnnify.convert(model, posterior_std=0.1)
        torch.save({"bnn": bnn, "inputs": inputs}, tmp_path / name)
        torch.manual_seed(5)
        expected[name] = [tensor.tolist() for tensor in zoo.tensors(bnn(*inputs)[0])]
    script = (
        "import json, sys, torch\n"
        "from tests import zoo\n"
        "torch.set_num_threads(1)\n"
        "found = {}\n"
        "for name in zoo.ZOO:\n"
        "    saved = torch.load(f'{sys.argv[1]}/{name}', weights_only=False)\n"
        "    torch.manual_seed(5)\n"
        "    output = saved['bnn'](*saved['inputs'])[0]\n"
        "    found[name] = [tensor.tolist() for tensor in zoo.tensors(output)]\n"
        "print(json.dumps(found))\n"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", script, str(tmp_path)]
    finished = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout.splitlines()[-1]) == expected


def test_repr_shows_estimator_and_prior():
    text = repr(bnnify.convert(zoo.build("mlp")[0]))
    assert all(part in text for part in ("BayesianLinear", "reparameterization", "Pretrained"))
