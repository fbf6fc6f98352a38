"""The regressions side by side, and active learning: who is trained on what, and what is chosen by what."""

import argparse
import sys
import zipfile

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, Normal

pytest.importorskip("rich")
pytest.importorskip("torchmetrics")
pytest.importorskip("torchvision")

import bnnify
from benchmarks.harness.data import Images
from benchmarks.quality import active_learning, lenet_fashion, uci_regression
from benchmarks.quality.uci_choice import Choice, Setting, Trainer
from benchmarks.quality.uci_data import Parts, Regression, read
from benchmarks.quality.uci_networks import (
    Networks,
    NoisyNetworks,
    densities,
    fitted_factor,
    fitted_noise,
    scores,
    train,
)


@pytest.fixture
def yacht(tmp_path):
    """A folder with an archive of the form of the real one, of 60 data and two splits."""
    random = np.random.default_rng(0)
    table = random.normal(size=(60, 4))
    files = {"data": table, "index_features": [[0], [1], [2]], "index_target": [3], "n_splits": [2], "n_hidden": [5]}
    files |= {f"index_test_{split}": random.permutation(60)[:6] for split in range(2)}
    with zipfile.ZipFile(tmp_path / "uci_regression.zip", "w") as archive:
        for name, values in files.items():
            with archive.open(f"yacht/{name}.txt", "w") as file:
                np.savetxt(file, values)
    return tmp_path


def parts(networks=2):
    torch.manual_seed(0)
    data = Regression("noise", torch.randn(40, 3), torch.randn(40), [], 5)
    rows = [torch.randperm(40) for _ in range(networks)]
    return Parts.of(data, [(order[:30], order[30:]) for order in rows])


@pytest.mark.parametrize("kind", [Networks, NoisyNetworks])
@pytest.mark.parametrize("bayesian", [False, True])
def test_networks_side_by_side_learn_nothing_from_each_other(bayesian, kind):
    found = []
    for factor in (1.0, -3.0):
        data = parts()
        data.targets[1] *= factor
        torch.manual_seed(1)
        model = kind(2, 3, 5)
        nll = model.nll()
        if bayesian:
            model = bnnify.convert(model, select=["w*", "b*"], prior=bnnify.Pretrained(std=0.1), posterior_std=0.02)
        train(model, nll, data, steps=5, batch_size=10)
        found.append(torch.stack(densities(model, nll, data.held_inputs, 2)))
    first, second = found
    torch.testing.assert_close(first[:, :, 0], second[:, :, 0])
    assert not torch.allclose(first[:, :, 1], second[:, :, 1])


def test_the_score_is_the_density_of_the_mixture_in_the_units_of_the_data():
    data, drawn = parts(), torch.randn(7, 2, 10, 1)
    noise = torch.rand(7, 2, 10, 1) + 0.5
    found = scores(drawn, noise, data)
    scale = data.scale[:, None]
    means, stds = (each[..., 0].movedim(0, -1) * scale[..., None] for each in (drawn, noise))
    mixture = MixtureSameFamily(Categorical(torch.ones(7)), Normal(means, stds))
    torch.testing.assert_close(found["LL"], mixture.log_prob(data.held_targets[..., 0] * scale).mean(1))
    errors = data.held_targets[..., 0] * scale - mixture.mean
    torch.testing.assert_close(found["RMSE"], errors.square().mean(1).sqrt())
    torch.testing.assert_close(found["coverage"], (errors.abs() < 1.6449 * mixture.stddev).float().mean(1))


def test_the_noise_fitted_to_one_network_is_its_error():
    targets, drawn = torch.randn(2, 500, 1), torch.zeros(1, 2, 500, 1)
    rmse = targets.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(fitted_noise(drawn, targets), rmse, rtol=0.05, atol=0.0)


def test_noise_that_is_too_small_everywhere_gets_the_factor_that_it_lacks():
    noise = torch.rand(1, 2, 5000, 1) + 0.1
    targets = 3.0 * noise[0] * torch.randn(2, 5000, 1)
    found = fitted_factor(torch.zeros(1, 2, 5000, 1), noise, targets)
    torch.testing.assert_close(found, torch.full((2, 1, 1), 3.0), rtol=0.06, atol=0.0)


def test_a_training_that_went_astray_is_not_chosen(yacht):
    options = argparse.Namespace(epochs=1, steps=[2, 5], samples=3, initial_std=0.01, first_split=0)
    data = read(yacht, "yacht")
    validate = Trainer(data, [data.validation(split) for split in range(2)], options, NoisyNetworks)
    astray, good = Setting(0.5), Setting(1.0)
    for setting in (astray, good):
        validate.plain(setting)
    with torch.no_grad():
        validate.plain(astray)[0].w1[1] = torch.nan
    best = Choice.among([astray, good], validate, learned_noise=True).settings
    assert best[1] == good


def test_settings_are_chosen_without_the_test_part(yacht):
    data = read(yacht, "yacht")
    for split in range(2):
        rows = torch.cat([*data.validation(split), data.tests[split]])
        assert sorted(rows.tolist()) == list(range(60))


def test_all_networks_of_a_data_set_have_a_row_of_the_table(yacht):
    options = argparse.Namespace(
        data=yacht, splits=None, first_split=0, epochs=1, steps=[2, 5], members=2, samples=3, initial_std=0.01
    )
    options.rows = uci_regression.ROWS
    rows = list(uci_regression.measured("yacht", options))
    assert all(len(row[metric]) == 2 for row in rows for metric in uci_regression.METRICS)
    table, gained = uci_regression.tables(rows)
    assert [row[0] for row in table.rows] == ["yacht, 2 splits", "MC dropout, published", *(r["network"] for r in rows)]
    assert all(row[3] for row in table.rows[3:])
    # Networks of two kinds, half each: by Jensen at least as likely as they are on average.
    likely = {row["network"]: torch.tensor(row["LL"]) for row in rows}
    for kind in ("bnnify, ELBO", "deterministic"):
        apart = (likely[kind] + likely[f"{kind}, noise of each input"]) / 2
        assert (likely[f"{kind}, both kinds of noise"] > apart).all()
    [[_, published, of_posterior, *_]] = gained.rows
    ours, plain = (likely[f"{kind}, both kinds of noise"].mean().item() for kind in ("bnnify, ELBO", "deterministic"))
    assert float(published.split()[0]) == pytest.approx(ours + 1.25, abs=1e-3)
    assert float(of_posterior.split()[0]) == pytest.approx(ours - plain, abs=1e-3)
    alone, of_pairs = uci_regression.tables(rows[-1:])  # a run that left out what the others are measured against
    assert alone.rows[-1][3] == ""
    assert of_pairs.rows == [["yacht", "", "", "", "", ""]]


def test_the_splits_of_a_data_set_may_be_run_in_parts(yacht):
    options = argparse.Namespace(
        data=yacht, splits=1, epochs=1, steps=[2, 5], members=1, samples=3, initial_std=0.01, rows=["deterministic"]
    )
    found = []
    for options.first_split in (0, 1):
        [row, *_] = uci_regression.measured("yacht", options)
        assert len(row["LL"]) == 1
        found.append(row["LL"])
    assert found[0] != found[1]


@pytest.mark.parametrize("rule", active_learning.RULES)
def test_each_round_labels_the_images_of_the_highest_score(rule, monkeypatch):
    images = Images(torch.randint(256, (60, 1, 28, 28), dtype=torch.uint8), torch.arange(60) % 10)
    labelled, chosen = [], []

    def scored(model, known, others, options):
        scores = wanted(model, known, others, options)
        labelled.append(known.pixels)
        chosen.append(others.pixels[scores.argsort(descending=True)[:10]])
        return scores

    wanted = active_learning.RULES[rule]
    monkeypatch.setitem(active_learning.RULES, rule, scored)
    options = argparse.Namespace(pool=50, first=10, each=10, rounds=2, steps=2, tuning_steps=2, fraction=0.1, samples=2)
    assert len(active_learning.learn(rule, 0, images, images, options)) == 3
    assert torch.equal(labelled[1], torch.cat([labelled[0], chosen[0]]))


def test_images_are_drawn_in_proportion_to_their_scores():
    torch.manual_seed(0)
    rule = active_learning.drawn(lambda model, labelled, others, options: torch.tensor([0.0, 1.0, 3.0]))
    first = torch.stack([rule(None, None, None, None) for _ in range(4_000)]).argmax(1)
    torch.testing.assert_close(first.bincount(minlength=3) / 4_000, torch.tensor([0, 0.25, 0.75]), atol=0.03, rtol=0)


def test_of_two_images_that_are_alike_only_one_is_chosen_before_another(monkeypatch):
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 1.5]])  # of two networks, for three images
    outputs = torch.stack([logits.T, -logits.T]).movedim(1, 0).reshape(4, 3, 1) * torch.tensor([1.0, -1.0])
    monkeypatch.setattr(
        active_learning, "_fine_tuned", lambda *_: argparse.Namespace(sample=lambda x, num_samples: outputs)
    )
    images = Images(torch.zeros(3, 1, 28, 28, dtype=torch.uint8), torch.zeros(3))
    options = argparse.Namespace(samples=4, each=3)
    scores = active_learning.one_after_another(None, images, images, options)
    assert scores.argsort(descending=True).tolist() == [0, 2, 1]


def test_the_rows_of_lenet_are_printed_from_what_was_kept(monkeypatch, tmp_path, capsys):
    pytest.importorskip("ivon")
    images = Images(torch.randint(256, (40, 1, 28, 28), dtype=torch.uint8), torch.arange(40) % 10)
    monkeypatch.setattr(lenet_fashion, "DATA", dict.fromkeys(lenet_fashion.DATA, lambda train, data: images))
    monkeypatch.setattr(lenet_fashion, "NUM_TRAIN", 30)
    kept = tmp_path / "kept.json"
    printed = []
    rows = ["deterministic", "elbo", "ivon"]
    for arguments in (["--validate", "--predict-samples=2", f"--output={kept}", "--rows", *rows], [f"--from={kept}"]):
        monkeypatch.setattr(sys, "argv", ["lenet_fashion", "--markdown", "--threads=1", *arguments])
        lenet_fashion.main()
        printed.append(capsys.readouterr().out.partition("\n\n")[2].partition("\n\n")[0])
    assert printed[0] == printed[1]
    assert printed[0].count("IVON") == 2
