"""The prior: its scale goes where the tensors of a model go, and nothing trains its mean."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnnify
from bnnify.draws.companions import INITIAL_STD, PriorMean, from_buffer
from bnnify.modules import mean_field
from bnnify.modules.parameters import unique_bayesian_parameters


def network(seed=0, factor=1.0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


def trained(**options):
    bnn = bnnify.convert(network(factor=3.0), **options)
    with torch.no_grad():
        for parameter in unique_bayesian_parameters(bnn.module):
            parameter.mean.add_(0.1)
            parameter.rho.add_(1.0)
    return bnn


def without_scale(state):
    """As version 0.1 has written it."""
    return {name: tensor for name, tensor in state.items() if not name.endswith(INITIAL_STD)}


# The scale


def copied_tensors(source, target):
    for tensor, own in zip(source.state_dict().values(), target.state_dict().values(), strict=True):
        own.copy_(tensor)


CARRIED = {
    "load_state_dict": lambda source, target: target.load_state_dict(source.state_dict()),
    "assigned": lambda source, target: target.load_state_dict(source.state_dict(), assign=True),
    "load_weights": lambda source, target: bnnify.load_weights(target, source.module.state_dict()),
    "copies of tensors": copied_tensors,
}


@pytest.mark.parametrize("carry", CARRIED.values(), ids=CARRIED.keys())
def test_whatever_carries_the_tensors_of_a_model_carries_the_scale_of_its_prior(carry):
    options = {"prior": bnnify.Pretrained()}
    source, target = trained(posterior_std=bnnify.Relative(0.4), **options), bnnify.convert(network(seed=1), **options)
    assert source.kl() != target.kl()
    carry(source, target)
    assert torch.equal(target.kl(), source.kl())
    assert torch.equal(target(torch.ones(2, 6))[1], source.kl())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda bnn: pickle.loads(pickle.dumps(bnn))], ids=["copy", "pickle"])
def test_copies_have_a_scale_and_a_prior_mean_of_their_own(copied):
    bnn = trained()
    other = copied(bnn)
    assert torch.equal(other.kl(), bnn.kl())
    other.module[0].weight_initial_std.mul_(2.0)
    assert not torch.equal(other.kl(), bnn.kl())
    other.requires_grad_(True)
    assert not other.module[0].weight_prior_mean.requires_grad


@pytest.mark.parametrize("strict", [True, False])
def test_a_state_dict_without_scales_gives_those_that_follow_from_its_prior_means(strict):
    source, target = trained(), bnnify.convert(network(seed=1))
    assert not target.load_state_dict(without_scale(source.state_dict()), strict=strict).missing_keys
    assert torch.equal(target.kl(), source.kl())


def test_only_a_prior_that_takes_its_scale_from_the_weights_adds_a_number_to_the_state():
    for prior in [bnnify.Gaussian(), bnnify.Laplace(), bnnify.Pretrained(std=0.1), bnnify.ScaleMixture()]:
        bnn = bnnify.convert(network(), prior=prior)
        assert not list(bnn.buffers())
        assert list(bnn.state_dict()) == [
            name for name in bnnify.convert(network()).state_dict() if name in bnn.state_dict()
        ]


def test_a_prior_of_the_users_own_finds_the_scale_unless_it_says_that_it_needs_none():
    class Own(bnnify.Prior):
        def kl(self, posterior):
            return posterior.mean**2 / posterior.initial_std

    class Scaleless(Own):
        needs_initial_std = False

        def kl(self, posterior):
            assert posterior.initial_std is None
            return posterior.mean**2

    model = nn.Linear(4, 3, bias=False)
    bnn = bnnify.convert(model, prior=Own(), posterior_std=0.5)
    torch.testing.assert_close(bnn.kl(), 2 * bnnify.convert(model, prior=Scaleless()).kl())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_cast_model_keeps_its_prior(dtype):
    bnn = trained()
    before = bnn.kl().item()
    assert bnn.to(dtype).kl().item() == pytest.approx(before, rel=0.05)


def as_tensor(buffer):
    """The form of a scale on a GPU."""
    return buffer.clone().reshape(())


def test_a_scale_that_is_not_at_hand_gives_the_same_sample_kl_and_gradients(monkeypatch):
    bnn, x = trained(), torch.ones(2, 6)

    def step():
        torch.manual_seed(0)
        bnn.zero_grad()
        output, kl = bnn(x)
        (output.square().sum() + kl).backward()
        return output.detach(), kl.detach(), [p.grad for p in bnn.parameters() if p.grad is not None]

    at_hand = step()
    monkeypatch.setattr(mean_field, "from_buffer", as_tensor)
    torch.testing.assert_close(step(), at_hand)


def test_a_prior_far_narrower_than_numbers_have_squares_has_a_finite_gradient_where_its_scale_is_not_at_hand(
    monkeypatch,
):
    monkeypatch.setattr(mean_field, "from_buffer", as_tensor)
    bnn = bnnify.convert(nn.Linear(4, 3, bias=False), posterior_std=1e-25)
    bnn(torch.ones(1, 4))[1].backward()
    assert bnn.module.weight.grad.isfinite().all()
    assert bnn.module.weight_rho.grad.isfinite().all()


def test_a_scale_as_a_tensor_is_not_the_buffer_which_ddp_overwrites_before_each_forward():
    buffer, scales = torch.ones(1), []
    torch.func.vmap(lambda x: scales.append(from_buffer(buffer)) or x)(torch.ones(2))
    assert from_buffer(buffer) == 1.0
    (scale,) = scales
    buffer.fill_(2.0)
    assert isinstance(scale, torch.Tensor)
    assert scale == 1.0


def test_collapse_takes_the_scale_away():
    assert bnnify.collapse(trained()).state_dict().keys() == network().state_dict().keys()


# The mean

UNFREEZE = {
    "on the model": lambda bnn: bnn.requires_grad_(True),
    "one by one": lambda bnn: [parameter.requires_grad_() for parameter in bnn.parameters()],
    "by the flag": lambda bnn: [setattr(parameter, "requires_grad", True) for parameter in bnn.parameters()],
    "after an assignment": lambda bnn: (bnn.load_state_dict(bnn.state_dict(), assign=True), bnn.requires_grad_(True)),
    "of what it was replaced by": lambda bnn: [replaced(p).requires_grad_() for p in unique_bayesian_parameters(bnn)],
}


def replaced(parameter):
    """What a tool that knows nothing of prior means, such as one that shards a model, makes of one."""
    name = parameter.attribute + "_prior_mean"
    made = parameter.module._parameters[name] = nn.Parameter(parameter.prior_mean.data)
    return made


@pytest.mark.parametrize("unfreeze", UNFREEZE.values(), ids=UNFREEZE.keys())
def test_whoever_unfreezes_a_model_does_not_train_its_prior(unfreeze):
    bnn = bnnify.convert(network())
    bnn.requires_grad_(False)
    unfreeze(bnn)
    for parameter in bnn.parameters():
        if not isinstance(parameter, PriorMean):
            parameter.requires_grad_()
    flags = {parameter.prior_mean.requires_grad for parameter in unique_bayesian_parameters(bnn)}
    assert flags == {unfreeze is UNFREEZE["of what it was replaced by"]}
    kept = [parameter.prior_mean.clone() for parameter in unique_bayesian_parameters(bnn)]
    groups = bnn.parameter_groups(lr=0.1, weight_decay=0.1)
    grouped = {id(parameter) for group in groups for parameter in group["params"]}
    optimizers = [torch.optim.SGD(groups), torch.optim.AdamW(bnn.parameters(), lr=0.1)]
    for _ in range(3):
        output, kl = bnn(torch.ones(4, 6))
        bnn.zero_grad()
        (F.mse_loss(output, torch.ones(4, 3)) + kl).backward()
        for optimizer in optimizers:
            optimizer.step()
    for parameter, before in zip(unique_bayesian_parameters(bnn), kept, strict=True):
        assert torch.equal(parameter.prior_mean, before)
        assert id(parameter.prior_mean) not in grouped
        assert not torch.equal(parameter.mean, before)


def test_the_mean_of_a_prior_is_a_parameter_still():
    bnn = bnnify.convert(network())
    assert "0.weight_prior_mean" in dict(bnn.module.named_parameters())
    assert type(bnn.module.state_dict()["0.weight_prior_mean"]) is torch.Tensor
    assert type(bnn.double().module[0].weight_prior_mean) is PriorMean
    bnn.module[0].weight_prior_mean.data.mul_(2.0)
    assert bnn.kl() > 1.0


def test_half_precision_is_for_what_is_computed_with_and_not_for_the_scale():
    bnn = bnnify.convert(nn.Linear(30, 30), posterior_std=1e-7)
    before = bnn.module.weight_initial_std.clone()
    bnn.half()
    assert bnn.module.weight.dtype == torch.float16
    assert torch.equal(bnn.module.weight_initial_std, before)
    assert bnn.kl().isfinite()
