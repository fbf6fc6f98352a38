"""The posterior of one task as the prior of the next: its KL, where training starts, and files."""

import copy
import glob

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

import bnnify
from bnnify import ConversionError
from tests import zoo


def moved(bnn, amount=0.05, seed=1):
    """As training leaves a model: every mean and every σ somewhere else."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in bnn.parameters():
            if parameter.requires_grad and parameter.dtype.is_floating_point:
                parameter.add_(amount * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return bnn


def successor(bnn, **options):
    return bnnify.convert(bnnify.collapse(bnn), prior=bnnify.posterior_of(bnn), **options)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_a_model_goes_on_from_its_posterior_with_no_kl_and_with_the_same_networks(name):
    model, inputs = zoo.build(name)
    bnn = moved(bnnify.convert(model))
    after = successor(bnn)
    assert abs(after.kl().item()) < 1e-6 * sum(p.numel() for p in bnn.parameters())
    torch.manual_seed(0)
    with torch.no_grad(), bnn.draw():
        expected = bnn.module.eval()(*copy.deepcopy(inputs))
    torch.manual_seed(0)
    with torch.no_grad(), after.draw():
        found = after.module.eval()(*copy.deepcopy(inputs))
    for one, other in zip(zoo.tensors(found), zoo.tensors(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_kl_is_that_of_each_weight_from_where_it_was():
    before = moved(bnnify.convert(nn.Linear(7, 5, dtype=torch.float64), posterior_std=0.3))
    after = moved(successor(before), seed=2)
    expected = 0.0
    for name in ("weight", "bias"):
        q, p = (
            Normal(parameters[name], nn.functional.softplus(parameters[f"{name}_rho"]))
            for parameters in (dict(after.module.named_parameters()), dict(before.module.named_parameters()))
        )
        expected = expected + kl_divergence(q, p).sum()
    torch.testing.assert_close(after.kl(), expected)
    gradients = torch.autograd.grad(after.kl(), [after.module.weight, after.module.weight_rho])
    for mine, theirs in zip(
        gradients, torch.autograd.grad(expected, [after.module.weight, after.module.weight_rho]), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_a_point_posterior_has_its_density():
    before = moved(bnnify.convert(nn.Linear(7, 5), posterior_std=0.3))
    after = moved(successor(before, posterior=bnnify.Point()), seed=2)
    expected = sum(
        -Normal(before.module._parameters[name], nn.functional.softplus(before.module._parameters[f"{name}_rho"]))
        .log_prob(after.module._parameters[name])
        .sum()
        for name in ("weight", "bias")
    )
    torch.testing.assert_close(after.kl(), expected)


def test_what_is_new_gets_the_default_or_what_is_added():
    old = bnnify.convert(nn.ModuleDict({"a[0]": nn.Linear(4, 4), "b": nn.Linear(4, 4)}))
    new = nn.ModuleDict({"a[0]": nn.Linear(4, 4), "b": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    priors = bnnify.posterior_of(old)
    del priors["b.bias"]
    bnn = bnnify.convert(new, prior=priors | {"head": bnnify.Gaussian(std=0.5)})
    kinds = {name: type(each.settings.prior).__name__ for name, each in _parameters(bnn).items()}
    assert kinds == {
        **dict.fromkeys(("a[0].weight", "a[0].bias", "b.weight"), "Elementwise"),
        "b.bias": "Pretrained",
        **dict.fromkeys(("head.weight", "head.bias"), "Gaussian"),
    }
    assert glob.escape("a[0].weight") in priors
    torch.testing.assert_close(_parameters(bnn)["b.weight"].prior_mean.data, old.module["b"].weight.data)


def test_a_part_that_is_called_module_is_a_part():
    whole = bnnify.convert(nn.ModuleDict({"module": nn.Linear(4, 4), "head": nn.Linear(4, 2)}))
    assert list(bnnify.posterior_of(whole.module)) == list(bnnify.posterior_of(whole))
    assert "module.weight" in bnnify.posterior_of(whole)


@pytest.mark.parametrize("ending", [".bnn.pt", ".safetensors", ""])
def test_a_file_has_the_prior(ending, tmp_path):
    model, _ = zoo.build("residual_block")
    bnn = moved(successor(moved(bnnify.convert(model))), seed=2)
    bnnify.save(bnn, tmp_path / f"x{ending}", max_shard_size=None if ending else 1_000)
    loaded = bnnify.load(tmp_path / f"x{ending}", zoo.build("residual_block")[0])
    assert torch.equal(loaded.kl(), bnn.kl())
    fresh = successor(bnnify.convert(model))
    fresh.load_state_dict(copy.deepcopy(bnn.state_dict()), assign=True)
    assert torch.equal(fresh.kl(), bnn.kl())
    assert not any(p.requires_grad for name, p in fresh.named_parameters() if "prior" in name)


def test_nothing_trains_the_prior_nor_puts_other_weights_in_it():
    bnn = successor(moved(bnnify.convert(nn.Linear(7, 5))))
    trained = {id(p) for group in bnn.parameter_groups(lr=0.1) for p in group["params"]}
    bnn.requires_grad_(True)
    before = {name: each.clone() for name, each in bnn.module.named_parameters() if "prior" in name}
    assert len(before) == 4
    bnnify.load_weights(bnn, nn.Linear(7, 5).state_dict())
    for name, value in before.items():
        now = bnn.module.get_parameter(name)
        assert not now.requires_grad
        assert id(now) not in trained
        assert torch.equal(now, value), name


def test_a_narrow_prior_holds_what_was_learned_where_the_weight_was_certain():
    """Two targets in turn: the second moves the weight that the first left uncertain, and not the other one."""
    bnn = bnnify.convert(nn.Linear(2, 1, bias=False), posterior_std=0.1)
    with torch.no_grad():
        bnn.module.weight.zero_()
        bnn.module.weight_rho.copy_(torch.tensor([[0.001, 1.0]]).expm1().log())
    bnn = successor(bnn)
    optimizer = torch.optim.Adam([bnn.module.weight], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        output, kl = bnn(torch.ones(16, 2))
        (8 * (output - 1).square().mean() + kl).backward()
        optimizer.step()
    certain, uncertain = bnn.module.weight[0].tolist()
    assert abs(certain) < 0.01
    assert uncertain > 0.5


def _pruned():
    bnn = bnnify.convert(nn.Linear(9, 9))
    bnnify.prune(bnn, fraction=0.5)
    return bnn


def _again(bnn):
    return bnnify.convert(bnn, prior=bnnify.posterior_of(bnn))


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: successor(_pruned()), "`weight` .*pruned"),
        (lambda: successor(bnnify.convert(nn.Linear(3, 2), posterior=bnnify.Point())), r"`weight` .*Point\(\)"),
        (lambda: bnnify.posterior_of(nn.Linear(3, 2)), "no posterior"),
        (lambda: _again(successor(bnnify.convert(nn.Linear(3, 2)))), "bnnify.collapse first"),
        (
            lambda: bnnify.convert(nn.Linear(3, 2), prior=bnnify.posterior_of(bnnify.convert(nn.Linear(3, 3)))),
            r"shape \(2, 3\).*shape \(3, 3\)",
        ),
        (
            lambda: bnnify.convert(nn.Linear(3, 2, False), prior=bnnify.Elementwise(std=torch.zeros(2, 3))),
            "must be positive",
        ),
        (
            lambda: bnnify.convert(
                nn.Linear(3, 2, False), prior=bnnify.Elementwise(mean=torch.full((2, 3), torch.nan))
            ),
            "must be finite",
        ),
    ],
)
def test_what_cannot_be_a_prior_is_refused(make, found):
    with pytest.raises(ConversionError, match=found):
        make()


def _parameters(bnn):
    from bnnify.modules.parameters import bayesian_parameters

    return {each.name: each for each in bayesian_parameters(bnn.module)}
