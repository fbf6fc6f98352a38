"""Files in int8: the posterior within steps that are known, in about two bytes a weight; what must stay exact does."""

import json

import pytest
import torch
from torch import nn

import bnnify
from benchmarks.quality import int8_files
from bnnify.checkpoints.own_format import open_posterior
from bnnify.cli import main
from bnnify.distributions.gaussian import is_pruned, log_std
from bnnify.modules.parameters import bayesian_parameters
from tests import zoo

ENDINGS = pytest.mark.parametrize("ending", [".bnn.pt", ".safetensors"])


@pytest.fixture(autouse=True)
def needs_safetensors(request):
    if "ending" in request.fixturenames and request.getfixturevalue("ending") == ".safetensors":
        pytest.importorskip("safetensors")


def trained(model, **settings):
    """A conversion whose means have left the pretrained weights, and whose σ differ."""
    bnn = bnnify.convert(model, **settings)
    with torch.no_grad():
        for parameter in bnn.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return bnn


def saved_and_loaded(bnn, model, path):
    bnnify.save(bnn, path, dtype="int8")
    return bnnify.load(path, model)


def rows(tensor):
    return tensor.detach().double().flatten(1)


@ENDINGS
@pytest.mark.parametrize(
    "name", ["mlp", "residual_block", "tied_language_model", "lstm", "float64", "bfloat16", "transposed"]
)
def test_a_loaded_posterior_is_within_half_a_step_of_the_saved_one(name, ending, tmp_path):
    bnn = trained(zoo.build(name)[0])
    loaded = saved_and_loaded(bnn, zoo.build(name)[0], tmp_path / f"x{ending}")
    expected, found = bnn.module.state_dict(), loaded.module.state_dict()
    assert {key: value.dtype for key, value in found.items()} == {key: value.dtype for key, value in expected.items()}
    packed = set()
    for old, new in zip(bayesian_parameters(bnn.module), bayesian_parameters(loaded.module), strict=True):
        if old.mean.ndim == 1:
            continue
        rounding = torch.finfo(old.mean.dtype).eps
        packed |= {old.name + ending for ending in ("", "_rho", "_prior_mean")}
        mean = rows(old.mean)
        step = mean.abs().amax(1, keepdim=True) / 127
        assert ((rows(new.mean) - mean).abs() <= step / 2 + rounding * mean.abs()).all()
        logs = rows(log_std(old.rho.double()))
        step = (logs.amax(1, keepdim=True) - logs.amin(1, keepdim=True)) / 254
        tolerance = 4 * max(rounding, torch.finfo(torch.float32).eps) * rows(old.rho).abs().clamp(min=1)
        assert ((rows(log_std(new.rho.double())) - logs).abs() <= step / 2 + tolerance).all()
        distance = mean - rows(old.prior_mean)
        step = distance.abs().amax(1, keepdim=True) / 127
        error = rows(new.mean) - rows(new.prior_mean) - distance
        assert (error.abs() <= step / 2 + 2 * rounding * mean.abs()).all()
    assert packed
    assert all(torch.equal(found[key], value) for key, value in expected.items() if key not in packed)
    if name == "tied_language_model":
        assert loaded.module.head._parameters["weight_rho"] is loaded.module.embed._parameters["weight_rho"]


@ENDINGS
def test_a_weight_takes_two_bytes_and_a_third_once_it_has_left_the_mean_of_its_prior(ending, tmp_path):
    model = nn.Sequential(nn.Embedding(400, 512), nn.Linear(512, 400, bias=False))
    model[1].weight = model[0].weight  # tied: once
    path, numel = tmp_path / f"x{ending}", 400 * 512
    for bnn, most in (bnnify.convert(model), 2.1), (trained(model), 3.1):
        loaded = saved_and_loaded(bnn, model, path)
        assert path.stat().st_size < most * numel
        (before, *_), (after, *_) = (list(bayesian_parameters(each.module)) for each in (bnn, loaded))
        assert torch.equal(after.prior_mean, after.mean) == torch.equal(before.prior_mean, before.mean)
        assert loaded.kl().item() == pytest.approx(bnn.kl().item(), rel=0.01, abs=1.0)
        with torch.no_grad():
            after.mean.add_(1.0)  # in memory of its own
        assert not torch.equal(after.prior_mean, after.mean)


def test_zeros_and_pruned_weights_stay_exact(tmp_path):
    bnn = trained(nn.Linear(8, 6))
    with torch.no_grad():
        bnn.module.weight[0] = 0.0
        bnn.module.weight[1, ::2] = 0.0
        bnn.module.weight_rho[2] = -3.0
        bnn.module.weight_rho[3] = -200.0  # σ is zero in float32
    bnnify.prune(bnn, 0.5)
    with torch.no_grad():
        bnn.module.weight_rho[4] = -(2.0**14)
    loaded = saved_and_loaded(bnn, nn.Linear(8, 6), tmp_path / "x.pt").module
    assert torch.equal(is_pruned(loaded.weight_rho), is_pruned(bnn.module.weight_rho))
    assert not loaded.weight[bnn.module.weight == 0].any()
    kept = ~is_pruned(bnn.module.weight_rho)
    torch.testing.assert_close(loaded.weight_rho[kept], bnn.module.weight_rho[kept], rtol=1e-2, atol=0.02)


def test_the_file_states_the_error_that_it_makes_and_inspect_shows_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bnn = trained(nn.Linear(8, 6), select="weight")
    loaded = saved_and_loaded(bnn, nn.Linear(8, 6), "x.bnn.pt")
    assert main(["inspect", "x.bnn.pt", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dtype"] == "int8"
    error = (loaded.module.weight - bnn.module.weight) / bnn.module.weight.square().mean().sqrt()
    ratio = (log_std(loaded.module.weight_rho) - log_std(bnn.module.weight_rho)).expm1()
    for key, difference in ("mean_error", error), ("std_error", ratio):
        expected = [difference.abs().max().item(), difference.square().mean().sqrt().item()]
        assert found["error"]["weight"][key] == pytest.approx(expected, rel=1e-3)
    pytest.importorskip("rich")
    assert main(["inspect", "x.bnn.pt"]) == 0
    assert f"int8, error of μ, in units of its rms, {error.abs().max():.2g} (rms" in capsys.readouterr().out
    bnnify.save(bnn, "y.bnn.pt")
    assert main(["inspect", "y.bnn.pt", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] is None


def test_the_command_writes_int8_and_keeps_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bnn = trained(nn.Linear(64, 32))
    bnnify.save(bnn, "x.bnn.pt", dtype="int8")
    assert main(["-q", "prune", "x.bnn.pt", "0.5", "-o", "y.bnn.pt"]) == 0
    assert open_posterior("y.bnn.pt").dtype == "int8"
    assert bnnify.load("y.bnn.pt", nn.Linear(64, 32)).module.weight_rho.lt(-100).sum() > 900
    assert main(["-q", "collapse", "x.bnn.pt", "-o", "plain.pt"]) == 0
    plain = torch.load("plain.pt", weights_only=True)
    assert torch.equal(plain["weight"], bnnify.load("x.bnn.pt", nn.Linear(64, 32)).module.weight)
    model = ["--model", "torch.nn:Linear", "--model-args", '{"in_features": 64, "out_features": 32}']
    assert main(["-q", "convert", "plain.pt", *model, "--dtype", "int8", "-o", "z.bnn.pt"]) == 0
    assert open_posterior("z.bnn.pt").dtype == "int8"


def test_earlier_releases_refuse_it_by_its_format_and_read_all_other_files(tmp_path):
    bnn = bnnify.convert(nn.Linear(8, 6))
    for dtype, expected in ("int8", 6), (None, 5):
        bnnify.save(bnn, tmp_path / "x.pt", dtype=dtype)
        content = torch.load(tmp_path / "x.pt", weights_only=True)
        assert content["bnnify"]["format"] == expected
        assert ("weight" in content["state_dict"]) == (dtype is None)  # nobody takes codes for weights


def test_what_cannot_be_written_in_int8_is_refused_and_leaves_no_file(tmp_path):
    bnn = bnnify.convert(nn.Linear(8, 6))
    for dtype in "int4", torch.int8:
        with pytest.raises(bnnify.ArgumentError, match="save takes dtype='int8' or None"):
            bnnify.save(bnn, tmp_path / "x.pt", dtype=dtype)
    with torch.no_grad():
        bnn.module.weight[0, 0] = torch.nan
    with pytest.raises(bnnify.CheckpointError, match="`weight` in int8: it has values, or a ρ, that are NaN"):
        bnnify.save(bnn, tmp_path / "x.pt", dtype="int8")
    assert not list(tmp_path.iterdir())


DAMAGES = [
    lambda c: c["state_dict"].pop("weight.int8"),
    lambda c: c["state_dict"].pop("weight.scale"),
    lambda c: c["state_dict"].pop("weight_rho.int8"),
    lambda c: c["state_dict"].pop("weight_rho.range"),
    lambda c: c["state_dict"].update({"weight.scale": torch.ones(5)}),
    lambda c: c["state_dict"].update({"weight.int8": torch.ones(6, 8)}),
    lambda c: c["state_dict"].update({"weight_rho.int8": torch.ones(6, 7, dtype=torch.int8)}),
    lambda c: c["bnnify"]["int8"]["weight"].update(dtype="torch.int64"),
    lambda c: c["bnnify"]["int8"].update(absent=c["bnnify"]["int8"]["weight"]),
    lambda c: c["bnnify"].update(int8=[1]),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_in_one_line(damage, tmp_path):
    path = tmp_path / "x.pt"
    bnnify.save(bnnify.convert(nn.Linear(8, 6)), path, dtype="int8")
    content = torch.load(path, weights_only=True)
    damage(content)
    torch.save(content, path)
    with pytest.raises(bnnify.CheckpointError, match="is damaged: ") as error:
        bnnify.load(path, nn.Linear(8, 6))
    assert "\n" not in str(error.value)


def test_a_real_network_predicts_as_from_the_full_file(data_folder, tmp_path):
    full, small = int8_files.compared(data_folder, images=1000, samples=4, folder=tmp_path)
    assert small.size < 0.2 * full.size
    assert abs(small.nll - full.nll) <= 0.002
    assert torch.corrcoef(torch.stack([full.mutual_information, small.mutual_information]))[0, 1] > 0.99
