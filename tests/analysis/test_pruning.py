"""Pruning by signal-to-noise: which weights go, and that they stay away, in training, files and collapsed models."""

import copy
import math

import pytest
import torch
from torch import nn

import bnnify
from bnnify.distributions.gaussian import std
from bnnify.modules.parameters import unique_bayesian_parameters
from tests import zoo

PRUNED_MODELS = ("root_linear", "residual_block", "tied_language_model", "lstm", "attention", "transposed", "bfloat16")
PRIORS = (bnnify.Pretrained(), bnnify.Gaussian(std="learned"), bnnify.Laplace(), bnnify.ScaleMixture())


def converted(name, **options):
    model, inputs = zoo.build(name)
    bnn = bnnify.convert(model, **options)
    with torch.no_grad():
        for parameter in bnn.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return bnn, inputs


def layer(means, stds, **options):
    """A converted layer without bias of these posterior means and standard deviations."""
    made = nn.Linear(len(means), 1, bias=False)
    made.weight.data.copy_(torch.tensor([means]))
    return bnnify.convert(made, posterior_std=lambda weight, scale: torch.tensor([stds]), **options)


def zeros(bnn):
    """For each Bayesian parameter, where its mean is zero."""
    return {p.name: p.mean.detach() == 0 for p in unique_bayesian_parameters(bnn.module)}


def test_the_ratio_is_the_mean_over_the_standard_deviation():
    bnn = layer([0.5, -3.0, 0.0, 2.0], [0.1, 0.5, 1.0, 4.0])
    torch.testing.assert_close(bnnify.signal_to_noise(bnn), {"weight": torch.tensor([[5.0, 6.0, 0.0, 0.5]])})


@pytest.mark.parametrize(
    ("fraction", "left"), [(0, [1, 1, 1, 1]), (0.25, [1, 1, 1, 0]), (0.75, [0, 1, 0, 0]), (1, [0] * 4)]
)
def test_the_least_sure_weights_go_first(fraction, left):
    bnn = layer([0.5, -3.0, 0.2, 2.0], [0.1, 0.5, 0.1, 4.0])
    report = bnnify.prune(bnn, fraction)
    assert bnn.module.weight.bool().squeeze().tolist() == [bool(stays) for stays in left]
    assert report.fraction == fraction
    assert bnnify.signal_to_noise(bnn)["weight"].bool().squeeze().tolist() == [bool(stays) for stays in left]


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("name", PRUNED_MODELS)
def test_exactly_the_fraction_is_zero_in_the_whole_or_in_each_parameter(name, per_layer):
    bnn, _ = converted(name)
    ratios = bnnify.signal_to_noise(bnn)
    report = bnnify.prune(bnn, 0.6, per_layer=per_layer)
    total = sum(ratio.numel() for ratio in ratios.values())
    assert report.numel == total
    if per_layer:
        assert [entry.pruned for entry in report.entries] == [round(0.6 * ratio.numel()) for ratio in ratios.values()]
    else:
        assert report.pruned == round(0.6 * total)
    pruned = zeros(bnn)
    assert {entry.name: entry.pruned for entry in report.entries} == {n: int(z.sum()) for n, z in pruned.items()}
    groups = [[name] for name in ratios] if per_layer else [list(ratios)]
    for group in groups:
        gone = torch.cat([ratios[name][pruned[name]] for name in group])
        kept = torch.cat([ratios[name][~pruned[name]] for name in group])
        assert not len(gone) or not len(kept) or gone.max() <= kept.min()


def test_equal_ratios_are_no_excuse_for_another_fraction():
    bnn = bnnify.convert(nn.Linear(20, 5, bias=False), posterior_std=bnnify.Moped(0.1))  # |μ|/σ = 10 everywhere
    assert bnnify.prune(bnn, 0.3).pruned == 30


@pytest.mark.parametrize("name", PRUNED_MODELS)
def test_every_draw_agrees_that_a_pruned_weight_is_zero(name):
    bnn, inputs = converted(name)
    bnnify.prune(bnn, 0.5)
    for _ in range(3):
        with bnn.draw():
            for parameter in unique_bayesian_parameters(bnn.module):
                sample = getattr(parameter.module, parameter.attribute)
                pruned = parameter.mean == 0
                assert not sample[pruned].any()
                assert (sample != parameter.mean)[~pruned].all() or sample.dtype == torch.bfloat16
            bnn(*inputs)


@pytest.mark.parametrize("prior", PRIORS, ids=str)
@pytest.mark.parametrize("estimator", ["reparameterization", "local", "flipout"])
def test_fine_tuning_leaves_pruned_weights_at_zero_and_moves_the_others(prior, estimator):
    bnn = bnnify.convert(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)), prior=prior, estimator=estimator
    )
    bnnify.prune(bnn, 0.7)
    pruned, before = zeros(bnn), copy.deepcopy(bnn.module.state_dict())
    optimizer = torch.optim.Adam(bnn.parameter_groups(lr=0.01))
    for _ in range(5):
        output, kl = bnn(torch.randn(8, 2, 5, 5))
        optimizer.zero_grad()
        bnnify.elbo(output.square().mean(), kl, num_data=10).backward()
        optimizer.step()
    for name, tensor in bnn.module.named_parameters():
        if name in pruned:
            assert torch.equal(tensor == 0, pruned[name])
            assert (tensor != before[name])[~pruned[name]].all()
            rho = bnn.module.get_parameter(f"{name}_rho")
            assert not std(rho)[pruned[name]].any()
            assert (rho != before[f"{name}_rho"])[~pruned[name]].all()


def test_the_momentum_of_an_old_optimizer_does_not_bring_a_weight_back():
    bnn = bnnify.convert(nn.Linear(30, 20))
    x, optimizer = torch.randn(8, 30), torch.optim.Adam(bnn.parameter_groups(lr=0.1))

    def step():
        optimizer.zero_grad()
        output, kl = bnn(x)
        (output.square().mean() + kl).backward()
        optimizer.step()

    for _ in range(5):
        step()
    bnnify.prune(bnn, 0.5)
    pruned = zeros(bnn)
    for _ in range(5):
        step()
    assert bnn.module.weight[pruned["weight"]].any()  # it has moved the mean itself
    with bnn.draw():
        assert not bnn.module.weight[pruned["weight"]].any()
    assert not bnnify.collapse(bnn).weight[pruned["weight"]].any()


@pytest.mark.parametrize("prior", PRIORS, ids=str)
def test_the_kl_is_that_of_the_weights_that_are_left(prior, monkeypatch):
    means, stds = [0.5, -3.0, 0.2, 2.0, 0.7], [0.1, 0.5, 0.1, 4.0, 0.2]
    whole = layer(means, stds, prior=prior)
    bnnify.prune(whole, 0.4)
    left = [i for i, zero in enumerate(zeros(whole)["weight"].squeeze()) if not zero]
    assert len(left) == 3
    alone = layer([means[i] for i in left], [stds[i] for i in left], prior=prior)
    if prior == bnnify.Pretrained():
        alone.module.weight_initial_std.copy_(whole.module.weight_initial_std)
    noise = torch.randn(1, 5)
    kls = []
    for bnn, its_noise in ((whole, noise), (alone, noise[:, left])):
        monkeypatch.setattr("bnnify.draws.sample.noise_like", lambda mean, its_noise=its_noise: its_noise)
        kls.append(bnn.kl())
    torch.testing.assert_close(*kls)
    for bnn, kl in zip((whole, alone), kls, strict=True):
        kl.backward()
        assert bnn.module.weight.grad.isfinite().all()
        assert bnn.module.weight_rho.grad.isfinite().all()
    for name in ("weight", "weight_rho"):
        torch.testing.assert_close(
            whole.module.get_parameter(name).grad[:, left], alone.module.get_parameter(name).grad
        )
        gone = [i for i in range(5) if i not in left]
        assert not whole.module.get_parameter(name).grad[:, gone].any()


class Careless(bnnify.Prior):
    """A prior of the user's own that divides by σ."""

    def kl(self, posterior):
        return (posterior.mean / std(posterior.rho)).square() - std(posterior.rho).log()


def test_a_prior_of_ones_own_need_not_know_of_pruning():
    bnn = layer([0.5, -3.0, 0.2, 2.0], [0.1, 0.5, 0.1, 4.0], prior=Careless())
    bnnify.prune(bnn, 0.5)
    kl = bnn.kl()
    kl.backward()
    assert kl.item() == pytest.approx(25 - math.log(0.1) + 36 - math.log(0.5), rel=1e-5)
    assert bnn.module.weight.grad.bool().tolist() == [[True, True, False, False]]
    assert bnn.module.weight_rho.grad.bool().tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("name", ["residual_block", "tied_language_model", "lstm", "bfloat16"])
def test_files_copies_and_collapsed_models_stay_pruned(name, tmp_path):
    bnn, inputs = converted(name)
    bnnify.prune(bnn, 0.5)
    pruned = zeros(bnn)
    bnnify.save(bnn, tmp_path / "pruned.pt")
    loaded = bnnify.load(tmp_path / "pruned.pt", zoo.build(name)[0])
    fresh = bnnify.convert(zoo.build(name)[0])
    fresh.load_state_dict(bnn.state_dict())
    for other in (loaded, fresh, copy.deepcopy(bnn)):
        for left, right in zip(zeros(other).values(), pruned.values(), strict=True):
            assert torch.equal(left, right)
        torch.testing.assert_close(other.kl(), bnn.kl())
        output, kl = other(*inputs)
        (zoo.loss(output) + kl.to(torch.float32)).backward()
        for parameter in unique_bayesian_parameters(other.module):
            assert not parameter.mean.grad[parameter.mean == 0].any()
    plain = bnnify.collapse(bnn)
    for name, where in pruned.items():
        assert torch.equal(plain.get_parameter(name) == 0, where)


def test_loading_unpruned_weights_ends_it():
    model = nn.Linear(4, 5)
    bnn = bnnify.convert(model)
    bnnify.prune(bnn, 0.5)
    bnnify.load_weights(bnn, model.state_dict())
    assert torch.equal(bnn.module.weight, model.weight)
    assert not bnn.module._bayesian["weight"].state.has_pruned
    with bnn.draw():
        assert bnn.module.weight.all()


def test_pruning_again_goes_on_from_there():
    bnn, _ = converted("residual_block")
    bnnify.prune(bnn, 0.3)
    before = zeros(bnn)
    assert bnnify.prune(bnn, 0.3).fraction == pytest.approx(0.3, abs=0.01)
    assert all(torch.equal(before[name], where) for name, where in zeros(bnn).items())
    assert bnnify.prune(bnn, 0.1).fraction == pytest.approx(0.3, abs=0.01)  # nothing comes back
    with torch.no_grad():
        next(unique_bayesian_parameters(bnn.module)).mean.zero_()  # zero, but not pruned
    assert bnnify.prune(bnn, 0.3).fraction == pytest.approx(0.3, abs=0.01)
    bnnify.prune(bnn, 0.8)
    assert all(where[before[name]].all() for name, where in zeros(bnn).items())


def test_a_moving_average_and_compiled_code_keep_it():
    bnn = bnnify.convert(nn.Linear(6, 4))
    bnnify.prune(bnn, 0.5)
    average = torch.optim.swa_utils.AveragedModel(bnn, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    for _ in range(3):
        average.update_parameters(bnn)
    assert average.module.kl().isfinite()
    torch.testing.assert_close(average.module.kl(), bnn.kl())
    compiled = torch.compile(bnn, fullgraph=True, backend="eager")
    output, kl = compiled(torch.randn(3, 6))
    (output.sum() + kl).backward()
    assert not bnn.module.weight.grad[bnn.module.weight == 0].any()


def test_the_report_names_each_parameter():
    bnn = bnnify.convert(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2, bias=False)))
    report = bnnify.prune(bnn, 0.5, per_layer=True)
    assert [(entry.name, entry.numel) for entry in report.entries] == [("0.weight", 12), ("0.bias", 3), ("1.weight", 6)]
    assert str(report).splitlines()[0].split() == ["0.weight", "6", "of", "12", "50.00%"]
    assert "of 21 Bayesian weights" in str(report)


def test_a_point_posterior_has_no_noise_to_compare_with():
    bnn = bnnify.convert(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), posterior={"0": bnnify.Point()})
    assert list(bnnify.signal_to_noise(bnn)) == ["1.weight", "1.bias"]
    assert bnnify.prune(bnn, 1.0).numel == 8
    assert bnn.module[0].weight.all()


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan, "half", None, True])
def test_a_fraction_that_is_none_is_refused(fraction):
    with pytest.raises(bnnify.ArgumentError, match="between 0 and 1"):
        bnnify.prune(bnnify.convert(nn.Linear(2, 2)), fraction)


def test_without_values_nothing_is_pruned():
    with torch.device("meta"):
        bnn = bnnify.convert(nn.Linear(2, 2))
    with pytest.raises(bnnify.ArgumentError, match="`weight`: it is on the meta device"):
        bnnify.prune(bnn, 0.5)
