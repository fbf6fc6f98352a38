"""The report card: its rows are what predict and the plain network say, in a table, JSON and pictures."""

import builtins
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical, Independent, Normal, StudentT
from torch.utils.data import DataLoader, TensorDataset

import bnnify

pytest.importorskip("torchmetrics")

FAST = {"num_samples": 4, "bootstrap": 10}


def classifier(number=300):
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3))
    x = torch.randn(number, 2)
    labels = Categorical(logits=model(x)).sample()
    return bnnify.convert(model), x, labels


def loader(x, y, shuffle=False):
    return DataLoader(TensorDataset(x, y), 64, shuffle=shuffle)


def value(report, row, metric):
    return report.rows[row][metric].value


def test_its_rows_are_the_plain_network_the_average_and_both_with_their_temperature():
    bnn, x, y = classifier()
    report = bnnify.evaluate(bnn, loader(x, y), likelihood="logits", validation=loader(x[:99], y[:99]), seed=3, **FAST)
    logits, networks = bnn.module(x).detach(), bnn.predict(x, 4, seed=3, likelihood="logits")
    assert value(report, "posterior mean", "NLL") == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)
    assert value(report, "networks", "NLL") == pytest.approx(F.nll_loss(networks.mean.log(), y).item(), rel=1e-5)
    temperature = bnnify.Temperature.fit(bnn.predict(x[:99], 4, seed=3, likelihood="logits"), y[:99])
    assert report.temperatures["networks, tempered"] == pytest.approx(temperature.temperature, rel=1e-4)
    tempered = temperature(networks).mean.log()
    assert value(report, "networks, tempered", "NLL") == pytest.approx(F.nll_loss(tempered, y).item(), rel=1e-4)
    plain = logits / report.temperatures["posterior mean, tempered"]
    assert value(report, "posterior mean, tempered", "NLL") == pytest.approx(F.cross_entropy(plain, y).item(), rel=1e-4)
    accuracy = (networks.mean.argmax(-1) == y).float().mean().item()
    assert value(report, "networks, tempered", "accuracy") == pytest.approx(accuracy)
    assert report.num_data == 300
    assert list(report.rows) == [
        "posterior mean",
        "posterior mean, tempered",
        "networks",
        "networks, tempered",
    ]


def test_each_loader_is_read_once_in_whatever_order_it_comes():
    bnn, x, y = classifier()
    expected = bnnify.evaluate(bnn, loader(x, y), likelihood="logits", **FAST)
    reads = []

    def once(data):
        reads.append(len(reads))
        yield from data

    shuffled = bnnify.evaluate(bnn, once(loader(x, y, shuffle=True)), likelihood="logits", **FAST)
    for row, metrics in expected.rows.items():
        for name, figure in metrics.items():
            assert value(shuffled, row, name) == pytest.approx(figure.value, rel=1e-4)
    assert reads == [0]


def test_nothing_is_left_changed_and_the_same_seed_gives_the_same_report():
    bnn, x, y = classifier()
    bnn.train()
    before = torch.get_rng_state()
    reports = [bnnify.evaluate(bnn, [(x, y)], likelihood="logits", **FAST) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert reports[0] == reports[1]
    assert all(module.training for module in bnn.modules())
    with bnn.draw():
        assert bnnify.evaluate(bnn, [(x, y)], likelihood="logits", **FAST) == reports[0]


def test_foreign_data_are_told_apart_by_the_scores_of_the_prediction():
    sklearn = pytest.importorskip("sklearn.metrics")
    bnn, x, y = classifier()
    foreign = 3 * torch.randn(200, 2)
    report = bnnify.evaluate(bnn, loader(x, y), likelihood="logits", out_of_distribution=[foreign], **FAST)
    both = torch.cat([x, foreign])
    is_foreign = torch.cat([torch.zeros(300), torch.ones(200)])
    networks = bnn.predict(both, 4, seed=0, likelihood="logits")
    logits = bnn.module(both).detach()
    scores = {
        ("networks", "entropy"): networks.predictive_entropy,
        ("networks", "mutual information"): networks.mutual_information,
        ("networks", "max probability"): -networks.mean.amax(-1),
        ("posterior mean", "energy"): -logits.logsumexp(-1),
        ("posterior mean", "max probability"): -logits.softmax(-1).amax(-1),
    }
    for (row, score), values in scores.items():
        found = report.out_of_distribution[row][score]["AUROC"].value
        assert found == pytest.approx(sklearn.roc_auc_score(is_foreign, values), abs=2e-4)
    assert set(report.out_of_distribution["posterior mean"]) == {"entropy", "max probability", "energy"}
    assert report.num_foreign == 200


def test_pixels_are_judged_one_by_one_without_those_that_are_ignored():
    bnn = bnnify.convert(nn.Conv2d(2, 3, 1))
    x, y = torch.randn(10, 2, 4, 4), torch.randint(3, (10, 4, 4))
    y[:, 0] = 255
    batches = [(x[:6], y[:6]), (x[6:], y[6:])]
    nll = bnnify.CategoricalNLL(class_dim=1, ignore_index=255)
    report = bnnify.evaluate(bnn, batches, likelihood=nll, **FAST)
    flat = bnn.module(x).detach().movedim(1, -1)[y != 255]
    labels = y[y != 255]
    assert report.num_data == 120
    assert value(report, "posterior mean", "NLL") == pytest.approx(F.cross_entropy(flat, labels).item(), rel=1e-5)
    accuracy = (flat.argmax(-1) == labels).float().mean().item()
    assert value(report, "posterior mean", "accuracy") == pytest.approx(accuracy)
    same = bnnify.evaluate(bnn, batches, likelihood="logits", class_dim=1, ignore_index=255, **FAST)
    assert same == report


def test_yes_and_no_are_judged_answer_by_answer():
    bnn, x, _ = classifier()
    y = torch.randint(2, (300, 3))
    report = bnnify.evaluate(bnn, loader(x, y), likelihood="binary_logits", validation=loader(x, y), **FAST)
    logits = bnn.module(x).detach()
    expected = F.binary_cross_entropy_with_logits(logits, y.float()).item()
    assert value(report, "posterior mean", "NLL") == pytest.approx(expected, rel=1e-5)
    assert value(report, "networks, tempered", "NLL") < value(report, "networks", "NLL")
    assert report.num_data == 900


@pytest.mark.parametrize(
    ("likelihood", "distribution"),
    [
        (bnnify.GaussianNLL(std=0.5), lambda mean: Normal(mean, 0.5)),
        (lambda mean: StudentT(5.0, mean, 0.5), lambda mean: StudentT(5.0, mean, 0.5)),
    ],
)
def test_of_a_regression_the_nll_is_that_of_the_networks_own_distributions(likelihood, distribution):
    bnn = bnnify.convert(nn.Linear(3, 2), posterior_std=bnnify.Relative(0.3))
    x = torch.randn(200, 3)
    y = bnn.module(x).detach() + 0.5 * torch.randn(200, 2)
    report = bnnify.evaluate(bnn, loader(x, y), likelihood=likelihood, out_of_distribution=[4 * x], **FAST)
    outputs = []
    bnn.predict(x, 4, seed=0, output=lambda out: outputs.append(out.clone()) or out)
    log_probs = distribution(torch.stack(outputs)).log_prob(y)
    expected = -(log_probs.logsumexp(0) - torch.tensor(4.0).log()).mean().item()
    assert value(report, "networks", "NLL") == pytest.approx(expected, rel=1e-5)
    assert value(report, "posterior mean", "NLL") == pytest.approx(
        -distribution(bnn.module(x)).log_prob(y).mean().item(), rel=1e-5
    )
    assert report.out_of_distribution["networks"]["std over networks"]["AUROC"].value > 0.7


def test_the_report_prints_within_80_columns_and_is_json_and_pictures(tmp_path):
    bnn, x, y = classifier()
    regression = bnnify.convert(nn.Linear(2, 1))
    reports = [
        bnnify.evaluate(bnn, [(x, y)], likelihood="logits", validation=[(x, y)], out_of_distribution=x + 3, **FAST),
        bnnify.evaluate(
            regression, [(x, 1e4 * x[:, :1])], likelihood=bnnify.GaussianNLL(std=1.0), out_of_distribution=x, **FAST
        ),
        bnnify.evaluate(bnn, [(x, y)], likelihood="logits", num_samples=1, bootstrap=0),
    ]
    for number, report in enumerate(reports):
        assert max(map(len, str(report).splitlines())) <= 80
        found = json.loads(report.to_json(tmp_path / f"{number}.json"))
        assert found == json.loads((tmp_path / f"{number}.json").read_text())
        metric, figure = next(iter(report.rows["networks"].items()))
        assert found["rows"]["networks"][metric] == {"value": figure.value, "low": figure.low, "high": figure.high}
        report.plot(tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 5000
    assert reports[2].rows["networks"]["NLL"].low is None
    assert "bootstrap" not in str(reports[2])


def test_a_picture_that_cannot_be_written_is_an_error_of_bnnify(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("torchmetrics")
    bnn = bnnify.convert(nn.Linear(2, 2))
    report = bnnify.evaluate(bnn, [(torch.randn(20, 2), torch.arange(20) % 2)], likelihood="logits", num_samples=2)
    for path in tmp_path / "missing" / "report.png", tmp_path / "report.docx":
        with pytest.raises(bnnify.ArgumentError, match=r"^Cannot draw `.*report\."):
            report.plot(path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"likelihood": "values"}, "does not tell how probable a target is"),
        ({"likelihood": "logits", "validation": []}, "evaluate was given a loader without batches"),
        ({"likelihood": "logits", "ignore_index": 0, "loader": 0}, "no target counts"),
        ({"likelihood": "logits", "loader": 7}, "evaluate: targets must be class numbers from 0 to 2, and one is 7"),
        ({"likelihood": lambda out: Independent(Normal(out, 1.0), 1)}, r"single numbers.*Independent over \(3,\)"),
        ({"likelihood": lambda out: Normal(out[:, 0], 1.0), "validation": 1}, "bnnify.ConformalIntervals"),
        (
            {"likelihood": "logits", "bootstrap": -1},
            r"evaluate\(bootstrap\) must be a number of resamples, or 0 for none, not -1",
        ),
        ({"likelihood": "logits", "seed": -1}, r"evaluate\(seed\) must be an integer from 0"),
    ],
)
def test_what_cannot_be_judged_is_refused(options, words):
    bnn, x, _ = classifier(20)
    options = dict(options)
    data = [(x, torch.full((20,), options.pop("loader", 1)))]
    if options.get("validation") == 1:
        options["validation"] = data
    with pytest.raises(bnnify.ArgumentError, match=words):
        bnnify.evaluate(bnn, data, **FAST | options)


def test_a_missing_library_is_named_with_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("torchmetrics"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    bnn, x, y = classifier(20)
    with pytest.raises(bnnify.MissingLibraryError, match="evaluate needs torchmetrics"):
        bnnify.evaluate(bnn, [(x, y)], likelihood="logits", **FAST)


def test_a_target_of_a_regression_that_is_not_finite_is_refused():
    bnn, y = bnnify.convert(nn.Linear(2, 1)), torch.zeros(5, 1)
    y[3] = torch.nan
    with pytest.raises(bnnify.ArgumentError, match="a target is not finite"):
        bnnify.evaluate(bnn, [(torch.randn(5, 2), y)], likelihood=bnnify.GaussianNLL(std=1.0), num_samples=2)
