"""The methods that the benchmarks compare, and what they are judged by."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("rich")
pytest.importorskip("torchmetrics")
pytest.importorskip("torchvision")

import bnnify
from benchmarks.harness import methods, peers, scores, shifted_images
from benchmarks.harness.data import Images
from benchmarks.harness.fine_tuning import run_steps
from benchmarks.harness.networks.cifar_resnet import ResNet, deepened, inputs, pretrained
from benchmarks.quality import cifar10_methods, cifar10_rows, cifar10_train_resnet


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (256, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.randint(10, (256,), generator=generator))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return ResNet(blocks=1).eval()


def test_scores_and_separations_are_those_of_evaluate():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    x, y, foreign = torch.randn(200, 4), torch.randint(3, (200,)), 3 * torch.randn(100, 4)
    found = bnnify.evaluate(
        bnnify.convert(model),
        [(x, y)],
        likelihood="logits",
        num_samples=2,
        out_of_distribution=[foreign],
        bootstrap=0,
    )
    with torch.no_grad():
        ours, told = scores.scores(model(x)[None], y, 1.0), scores.separations(model(x)[None], model(foreign)[None])
    figures = found.rows["posterior mean"]
    assert {name: ours[name] for name in scores.METRICS} == pytest.approx(
        {name: figures[name].value for name in scores.METRICS}, rel=1e-5
    )
    assert ours["tempered NLL"] == pytest.approx(ours["NLL"])
    theirs = found.out_of_distribution["posterior mean"]["entropy"]
    assert told == {"entropy": pytest.approx({name: figure.value for name, figure in theirs.items()})}


def test_the_accuracy_at_a_coverage_is_that_of_the_surest_images():
    confidence = torch.linspace(0.5, 0.99, 10)
    logits = torch.stack([confidence, 1 - confidence], -1).log()[None]
    labels = torch.tensor([1, 0, 1, 0, 0, 0, 0, 0, 1, 0])  # the least sure answer is wrong, and two more are
    found = scores.scores(logits, labels, 1.0)
    assert found["accuracy"] == pytest.approx(0.7)
    assert found["accuracy at 90%"] == pytest.approx(7 / 9)
    assert found["accuracy at 80%"] == pytest.approx(6 / 8)
    assert scores.log_probabilities(logits.repeat(3, 1, 1)).exp() == pytest.approx(logits[0].exp())


def test_swag_draws_around_the_mean_of_the_weights_that_it_passed(network, images):
    swag = methods.Swag()
    first = torch.cat([each.detach().flatten() for each in network.parameters()])
    for shift in (-0.01, 0.0, 0.01):
        methods.write(network, first + shift)
        swag.collect(network)
    at_mean, drawn = (swag.networks(network, 1, scale, images)[0] for scale in (0.0, 1.0))
    weights, others = (torch.cat([e.detach().flatten() for e in each.parameters()]) for each in (at_mean, drawn))
    assert weights == pytest.approx(first, abs=1e-6)
    assert 0.001 < (others - first).std() < 0.02
    assert not torch.equal(at_mean.bn1.running_mean, network.bn1.running_mean)


def test_networks_differ_where_a_method_is_random_and_leave_the_weights_alone(network, images):
    ivon = pytest.importorskip("ivon")
    x = inputs(images.pixels[:8])
    optimizer = ivon.IVON(network.parameters(), lr=0.1, ess=100)
    before = [each.clone() for each in network.parameters()]
    for networks in (
        methods.ivon_networks(network, optimizer, 3),
        methods.repeated(methods.with_dropout(network, 0.1), 3),
        methods.posterior(bnnify.convert(network), 3),
    ):
        found = methods.predicted(networks, x)
        assert found.shape == (3, 8, 10)
        assert found.std(0).min() > 0
    assert all(map(torch.equal, network.parameters(), before))
    alone = methods.predicted(methods.together(network, network), x)
    assert torch.equal(alone[0], alone[1])


def test_a_step_of_ivon_has_the_gradient_at_the_draw_and_starts_from_the_mean(network, images):
    ivon = pytest.importorskip("ivon")
    seen = []
    optimizer = ivon.IVON(network.parameters(), lr=0.0, ess=100)
    weight = network.conv1.weight
    before = weight.detach().clone()
    network.register_forward_pre_hook(lambda *_: seen.append(weight.detach().clone()))
    made = peers.deterministic(network)
    run_steps(made, 1, images, optimizer, 2, around=lambda: optimizer.sampled_params(train=True), description="")
    assert len(seen) == 2
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(weight, before)


@pytest.mark.parametrize("kind", ["glm", "nn"])
def test_laplace_draws_less_the_more_precise_its_prior_is(network, images, kind):
    pytest.importorskip("laplace")
    made = methods.fitted_laplace(network, "all", "diag", images.take(slice(4)), 400)
    plain = methods.fitted_laplace(network, "all", "diag", images.take(slice(4)), 4)
    assert made.H == pytest.approx(100 * plain.H)
    x = inputs(images.pixels[:4])
    tight, wide = (methods.laplace_networks(made, precision, kind, 5)(x) for precision in (1e10, 1e4))
    assert tight.std(0).mean() < wide.std(0).mean()
    with torch.no_grad():
        assert tight.mean(0) == pytest.approx(network(x).log_softmax(-1), abs=1e-2)


def test_corruptions_go_round_the_images():
    pytest.importorskip("imagecorruptions")
    labels = torch.arange(10)
    pixels = torch.full((10, 3, 32, 32), 100, dtype=torch.uint8)
    found = dict(shifted_images.corrupted(Images(pixels, labels), severity=1, count=4))
    assert found["gaussian_noise"].labels.tolist() == [0, 1, 2, 3]
    assert found["impulse_noise"].labels.tolist() == [8, 9, 0, 1]
    assert not torch.equal(found["gaussian_noise"].pixels, pixels[:4])


def test_corruptions_are_the_same_in_every_run(monkeypatch, images):
    """Also one that makes a generator of its own, as scikit-image does for impulse noise."""

    def corrupt(image, severity, corruption_name):
        return image ^ np.random.default_rng(None).integers(256, size=image.shape, dtype=np.uint8)

    names = ("impulse_noise", "snow")
    library = SimpleNamespace(get_corruption_names=lambda: names, corrupt=corrupt)
    monkeypatch.setitem(sys.modules, "imagecorruptions", library)
    one, other = (dict(shifted_images.corrupted(images, 1, count=3)) for _ in range(2))
    assert all(torch.equal(one[name].pixels, other[name].pixels) for name in names)
    assert not torch.equal(one["snow"].pixels[0], one["snow"].pixels[1])


def test_the_jpegs_of_the_first_images_are_found_by_their_labels():
    assert shifted_images.jpeg_places(torch.tensor([3, 0, 3, 9])).tolist() == [3000, 0, 3001, 9000]


def test_a_setting_is_chosen_on_validation_images_once_and_kept_for_later_seeds(network, images):
    images = images.take(slice(100))  # one batch
    rows = cifar10_rows.Methods(network, images, images, SimpleNamespace(samples=1, members=1), {})
    tried, random = [], []

    def make(scale):
        tried.append(scale)
        random.append(torch.rand(()).item())
        wrong = F.one_hot((images.labels + 1) % 10, 10).float()
        return cifar10_rows.Made(lambda x: scale * wrong[None, : len(x)])

    assert rows.best("row", make, (1.0, 2.0)).setting == "1.0"
    assert rows.best("row", make, (1.0, 2.0)).setting == "1.0"
    assert tried == [1.0, 2.0, 1.0]
    assert len(set(random)) == 1  # the row is the same, whether it is chosen now or was before


def test_the_temperature_of_each_network_is_that_of_the_likeliest_average():
    torch.manual_seed(0)
    logits, labels = 5 * torch.randn(3, 50, 4), torch.randint(4, (50,))
    found = scores.common_temperature(logits, labels)
    assert found > 2
    for other in (0.9 * found, 1.1 * found):
        assert scores.nll(logits / found, labels) < scores.nll(logits / other, labels)
    assert scores.common_temperature(logits[:1], labels) == pytest.approx(scores.temperature(logits[:1], labels))


def test_a_multiple_of_the_std_leaves_the_means_and_the_original_alone(network):
    bnn = bnnify.convert(network)
    before = {name: each.clone() for name, each in bnn.state_dict().items()}
    after = methods.with_std_times(bnn, 0.5).state_dict()
    for name, each in before.items():
        assert torch.equal(bnn.state_dict()[name], each)
        if name.endswith("_rho"):
            assert torch.allclose(F.softplus(after[name]), F.softplus(each) / 2, rtol=1e-4)
        else:
            assert torch.equal(after[name], each)


def test_a_row_and_the_one_with_a_temperature_have_the_same_networks(network, images):
    options = SimpleNamespace(samples=2, members=1, linearised=False)
    rows = cifar10_rows.Methods(network, images, images, options, {}).rows(0)
    plain, tempered = rows["deterministic"](), rows["temperature"]()
    assert tempered.networks is plain.networks
    assert (plain.temperature, tempered.temperature > 0) == (1.0, True)


def test_bnnify_takes_the_std_and_the_temperature_that_go_together(network, images):
    images = images.take(slice(100))
    options = SimpleNamespace(samples=2, members=1, linearised=False)
    makers = cifar10_rows.Methods(network, images, images, options, {"bnnify, σ and temperature": "0.5"})
    found = makers.rows(1)["bnnify, σ and temperature"]()
    assert found.setting == "0.5"
    assert found.temperature > 1  # labels at random ask for no confidence at all
    again = makers.rows(1)["bnnify, σ and temperature"]()
    assert again.temperature == pytest.approx(found.temperature, rel=0.5)


def test_a_network_that_is_made_deeper_computes_what_it_did(network, images):
    deeper = deepened(network, 5)
    x = inputs(images.pixels[:4])
    with torch.no_grad():
        assert torch.equal(deeper(x), network(x))
    assert len(deeper.layer2) == 5
    F.cross_entropy(deeper(x), images.labels[:4]).backward()
    assert deeper.layer2[4].bn2.weight.grad.any()  # and can learn to do more


def test_a_deeper_network_is_read_from_its_checkpoint(images, tmp_path, monkeypatch):
    path = tmp_path / "deeper.pt"
    options = SimpleNamespace(blocks=2, epochs=1, lr=0.1, checkpoint=path, start=None)
    trained = cifar10_train_resnet.train_epochs(images, options)
    read = pretrained(checkpoint=path)
    assert len(read.layer1) == 2
    assert all(map(torch.equal, read.state_dict().values(), trained.state_dict().values()))
    again = cifar10_train_resnet.train_epochs(images, options)  # finished: nothing is left to do
    assert torch.equal(again.conv1.weight, trained.conv1.weight)


def test_the_tables_are_printed_from_a_file(tmp_path, monkeypatch, capsys):
    row = {
        "setting": "0.1",
        "training s": 3.0,
        "networks": 2,
        "prediction ms": 1.0,
        "temperature": 1.0,
        "known": {"test": {"accuracy": 0.5, "NLL": 0.25}},
        "odd": {"noise": {"entropy": {"AUROC": 0.75, "FPR95": 0.2}}},
    }
    rows = [row | {"row": "deterministic", "seed": seed} for seed in (0, 1)]
    found = {"options": {"steps": 7}, "versions": {}, "machine": {"processor": "a processor", "threads": 1}}
    (tmp_path / "run.json").write_text(json.dumps(found | {"results": rows}))
    monkeypatch.setattr(sys, "argv", ["run", "--from", str(tmp_path / "run.json"), "--markdown"])
    cifar10_methods.main()
    shown = capsys.readouterr().out
    assert "| deterministic | 50.0 ± 0.0 | 0.250 ± 0.000 |" in shown
    assert "| deterministic | 75 ± 0 / 20 ± 0 |  |" in shown
    assert "| deterministic | 0.1 | 2 | 3 | 2 | 1.00 | 1.0 |" in shown
    assert "steps 7" in shown


def test_a_run_goes_on_where_it_stopped(data_folder, tmp_path, monkeypatch, capsys):
    for library in ("imagecorruptions", "skimage", "sklearn"):
        pytest.importorskip(library)
    output = tmp_path / "run.json"
    sizes = ["--steps", "1", "--images", "2", "--jpegs", "20", "--odd", "20", "--samples", "2", "--members", "2"]
    arguments = ["run", "--data", str(data_folder), "--threads", "1", "--output", str(output), *sizes, "--rows"]
    monkeypatch.setattr(sys, "argv", [*arguments, "deterministic"])
    cifar10_methods.main()
    first = json.loads(output.read_text())["results"]
    monkeypatch.setattr(sys, "argv", [*arguments, "deterministic", "temperature", "ensemble of 2"])
    cifar10_methods.main()
    rows = json.loads(output.read_text())["results"]
    assert [row["row"] for row in rows] == ["deterministic", "temperature", "ensemble of 2"]
    assert rows[:1] == first
    plain, tempered, ensemble = (row["known"]["test"] for row in rows)
    assert plain["accuracy"] == tempered["accuracy"] == pytest.approx(0.915, abs=0.01)
    assert tempered["NLL"] == pytest.approx(plain["tempered NLL"], rel=1e-4)
    assert tempered["NLL"] < plain["NLL"]
    assert ensemble["accuracy"] > 0.88
    assert "mutual information" in rows[2]["odd"]["noise"]
    assert "mutual information" not in rows[0]["odd"]["noise"]
