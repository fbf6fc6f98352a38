"""Fresh weights are told from trained ones, and a network that is not trained yet gets a prior with room."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnnify
from bnnify.distributions.untrained import looks_untrained
from bnnify.modules.parameters import unique_bayesian_parameters
from bnnify.prediction import predict

FRESH = {
    "linear": lambda: nn.Linear(64, 10).weight,
    "convolution": lambda: nn.Conv2d(3, 16, 3).weight,
    "depthwise": lambda: nn.Conv2d(32, 32, 3, groups=32).weight,
    "recurrent": lambda: nn.LSTM(28, 64).weight_ih_l0,
    "attention": lambda: nn.MultiheadAttention(32, 4).in_proj_weight,
    "He": lambda: nn.init.kaiming_normal_(torch.empty(128, 64, 3, 3), mode="fan_out"),
    "Glorot": lambda: nn.init.xavier_normal_(torch.empty(200, 100)),
    "truncated": lambda: nn.init.trunc_normal_(torch.empty(128, 64), std=0.02),
    "transformers": lambda: nn.init.normal_(torch.empty(512, 128), std=0.02),
    "zero": lambda: torch.zeros(10, 4),
}


@pytest.mark.parametrize("scheme", FRESH)
def test_what_initialisations_leave_looks_untrained(scheme):
    for seed in range(10):
        torch.manual_seed(seed)
        assert looks_untrained(FRESH[scheme]())


def test_a_small_head_with_normal_weights_needs_the_zeros_of_its_bias_to_tell():
    weight = nn.init.trunc_normal_(torch.empty(10, 64), std=0.02)
    assert not looks_untrained(weight)
    assert not looks_untrained(weight, torch.randn(10))
    assert looks_untrained(weight, torch.zeros(10))


def test_other_weights_do_not():
    fresh = nn.Linear(64, 32).weight.detach()
    assert not looks_untrained(fresh * 1.1)  # no scheme has this bound
    assert not looks_untrained(fresh * torch.linspace(0.5, 1, 32)[:, None])
    assert not looks_untrained(torch.randn(128, 64) * torch.linspace(0.005, 0.03, 128)[:, None])
    assert not looks_untrained(torch.randn(10))
    assert not looks_untrained(torch.full((20, 20), torch.nan))
    assert not looks_untrained(torch.empty(20, 20, device="meta"))


def digits():
    return torch.load(Path(bnnify.__file__).parent / "data" / "digits.pt", weights_only=True)


def split():
    saved = digits()
    images, labels = saved["images"].float() / 16, saved["labels"].long()
    return images[:500].flatten(1), labels[:500], images[500:].flatten(1), labels[500:]


def trained(model, x, y, bnn=None, epochs=30):
    parameters = model.parameters() if bnn is None else bnn.parameter_groups(lr=1e-3, rho_lr=1e-2)
    optimizer = torch.optim.Adam(parameters, 2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            if bnn is None:
                loss = F.cross_entropy(model(x[batch]), y[batch])
            else:
                logits, kl = bnn(x[batch])
                loss = bnnify.elbo(F.cross_entropy(logits, y[batch]), kl, num_data=len(x))
            loss.backward()
            optimizer.step()
    return model if bnn is None else bnn


def network():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def scales(bnn):
    return [parameter.initial_std.item() for parameter in unique_bayesian_parameters(bnn.module)]


def test_a_trained_network_does_not_and_its_prior_goes_by_sigma(data_folder):
    x, y, _, _ = split()
    model = trained(network(), x, y)
    assert not any(looks_untrained(layer.weight, layer.bias) for layer in (model[0], model[2]))
    bnn = bnnify.convert(model)
    assert not bnn.report.untrained
    rms = [p.detach().square().mean().sqrt().item() for p in model.parameters()]
    assert scales(bnn) == pytest.approx([0.04 * size for size in rms], rel=1e-3)
    saved = torch.load(data_folder / "checkpoints" / "resnet20-12fca82f.th", map_location="cpu", weights_only=True)
    assert not any(looks_untrained(weight) for weight in saved["state_dict"].values() if weight.ndim > 1)


def test_a_new_head_makes_the_prior_of_the_whole_network_wide_and_the_report_says_so():
    x, y, _, _ = split()
    model = trained(network(), x, y)
    model[2] = nn.Linear(64, 10)
    bnn = bnnify.convert(model)
    assert bnn.report.untrained == "2"
    assert "`2` looks untrained" in str(bnn.report)
    assert "rho_lr=lr" in str(bnn.report)
    rms = [p.detach().square().mean().sqrt().item() for p in model.parameters()]
    assert scales(bnn) == pytest.approx([2 * size for size in rms], rel=1e-3)
    bnnify.tune_std(bnn, x, likelihood="logits", labels=False)
    assert scales(bnn) == pytest.approx([2 * size for size in rms], rel=1e-3)
    from_data = bnnify.convert(model, posterior_std=bnnify.ResponseStd(x, likelihood="logits"))
    assert scales(from_data) == pytest.approx([10 * size for size in rms], rel=1e-3)
    body = bnnify.convert(model, select="0")
    assert not body.report.untrained
    given = bnnify.convert(model, prior=bnnify.Gaussian(std=0.1))
    assert all(parameter.initial_std is None for parameter in unique_bayesian_parameters(given.module))


def one_output():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))


@pytest.mark.parametrize(("build", "layer"), [(one_output, "0"), (lambda: nn.LSTM(8, 32), "LSTM")])
def test_where_the_last_parameters_are_too_few_those_before_tell(build, layer):
    torch.manual_seed(0)
    assert bnnify.convert(build()).report.untrained == layer


def test_a_trained_network_with_a_single_output_looks_trained():
    torch.manual_seed(0)
    x, y, _, _ = split()
    model = one_output()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for batch in torch.randperm(len(x)).split(50):
        optimizer.zero_grad()
        F.mse_loss(model(x[batch])[:, 0], y[batch].float()).backward()
        optimizer.step()
    assert not bnnify.convert(model).report.untrained


def test_trained_weights_that_are_loaded_afterwards_take_the_room_away():
    x, y, _, _ = split()
    bnn = bnnify.convert(network())
    assert bnn.report.untrained == "2"
    model = trained(network(), x, y)
    bnnify.load_weights(bnn, model.state_dict())
    assert not bnn.report.untrained
    assert scales(bnn) == pytest.approx(scales(bnnify.convert(model)), rel=1e-3)


def test_a_network_from_scratch_learns_by_the_loop_of_the_readme():
    x, y, unseen, labels = split()
    torch.manual_seed(1)
    model = network()
    plain = trained(copy.deepcopy(model), x, y)
    bnn = trained(None, x, y, bnnify.convert(model))
    found = predict(bnn.module, unseen, 16, likelihood="logits").mean.argmax(-1)
    accuracy, best = (found == labels).float().mean(), (plain(unseen).argmax(-1) == labels).float().mean()
    assert accuracy > best - 0.08
