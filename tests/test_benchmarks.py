"""What the benchmarks measure with: a wrong table would look like any other."""

import argparse
import importlib
import json
import pkgutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("rich")
pytest.importorskip("torchmetrics")

import benchmarks
from benchmarks.harness import data, fetch, fit, interleaved, progress, report, saved_tensors


def test_no_folder_of_the_benchmarks_is_on_the_path_once_all_of_them_are_imported():
    for module in pkgutil.walk_packages(benchmarks.__path__, "benchmarks."):
        if "families." not in module.name:  # which import what not everybody has installed
            importlib.import_module(module.name)
    folder = Path(benchmarks.__file__).parent
    paths = [Path(entry).resolve() for entry in sys.path]
    assert [path for path in paths if folder in (path, *path.parents)] == []


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x, x.clone())
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.saved_tensors[0]


def test_variants_take_turns():
    order = []
    variants = {name: lambda name=name: order.append(name) for name in "abc"}
    measured = interleaved.interleaved(variants, rounds=2, warmup=1, at_least=0.0)
    assert order == list("abcabcabc")
    assert {name: len(times) for name, times in measured.items()} == {"a": 2, "b": 2, "c": 2}


def test_a_short_call_is_repeated():
    calls = []
    measured = interleaved.interleaved({"a": lambda: calls.append(1)}, rounds=1, warmup=1, at_least=0.1)
    assert len(calls) > 2
    assert len(measured["a"]) == 1


def test_ratios_are_those_of_the_same_round():
    measured = {"plain": [1.0, 10.0, 100.0], "slow": [2.0, 30.0, 400.0]}
    assert interleaved.ratios(measured, "slow", "plain") == (2.5, 3.0, 3.5)


@pytest.mark.parametrize(
    ("loss", "tensors"),
    [
        (lambda x, weight: x * weight, 0),
        (lambda x, weight: weight.exp(), 1),
        (lambda x, weight: Square.apply(weight), 1),
        (lambda x, weight: weight.exp() + weight.exp().detach(), 1),
    ],
    ids=["what is there anyway is not counted", "a result", "a function of one's own", "a graph that is gone is not"],
)
def test_saved_bytes(loss, tensors):
    x, weight = torch.ones(100), nn.Parameter(torch.ones(100))
    assert saved_tensors.saved_bytes(lambda: loss(x, weight).sum(), [x, weight]) == 400 * tensors


def test_an_interrupted_run_leaves_what_it_has_measured(tmp_path):
    options = argparse.Namespace(threads=1, output=tmp_path / "made" / "run.json", markdown=False, rounds=3)
    run = report.Run(options, ["torch", "no-such-library"])

    def results():
        yield {"ms": 1.5}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.collect(results(), images=7)
    found = json.loads(options.output.read_text())
    assert found["results"] == [{"ms": 1.5}]
    assert found["images"] == 7
    assert found["options"]["rounds"] == 3
    assert found["versions"] | {"no-such-library": "not installed"} == found["versions"]


def test_figures_are_printed_again_with_how_they_were_found(tmp_path, capsys):
    path = tmp_path / "made" / "figures.json"
    for kept, output in ((None, path), (path, None)):
        options = argparse.Namespace(threads=1, output=output, kept=kept, markdown=True, epochs=3)
        report.run(options, ["torch"], lambda _: [{"nll": 0.25}], lambda rows: [report.Table(str(rows), ["nll"], [])])
    first, again = capsys.readouterr().out.split("[{'nll': 0.25}]")[1:]
    assert first == again
    assert "epochs 3" in first
    assert torch.__version__.partition("+")[0] in first
    assert list(path.parent.iterdir()) == [path]


def test_a_run_that_goes_on_keeps_what_is_there_already(tmp_path):
    options = argparse.Namespace(threads=1, output=tmp_path / "run.json")
    report.Run(options, []).collect([{"ms": 2}], already=[{"ms": 1}])
    assert json.loads(options.output.read_text())["results"] == [{"ms": 1}, {"ms": 2}]


def test_a_table_in_markdown_has_headings_for_the_rows_that_follow(capsys):
    report.show(report.Table("Title", ["", "two\nlines"], [["W1"], ["plain", "1.0"]]), markdown=True)
    assert capsys.readouterr().out == "Title\n\n|  | two lines |\n| --- | ---: |\n| W1 |  |\n| plain | 1.0 |\n\n"


@pytest.mark.parametrize(("drop_last", "sizes"), [(True, [4, 4, 4, 4, 4]), (False, [4, 4, 2, 4, 4])])
def test_batches_are_without_replacement_in_each_epoch(drop_last, sizes):
    batches = list(fit.shuffled(10, 4, steps=5, drop_last=drop_last))
    assert [len(batch) for batch in batches] == sizes
    assert len(torch.cat(batches[:2]).unique()) == 8


def test_a_step_takes_the_mean_of_the_gradients_of_its_draws():
    model = nn.Linear(1, 1, bias=False)
    before = model.weight.item()
    losses = iter([1.0, 3.0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    fit.fit(
        model.eval(),
        optimizer,
        (torch.ones(1, 1), torch.zeros(1)),
        [torch.tensor([0])],
        lambda model, inputs, labels: next(losses) * model(inputs).sum(),
        schedule=schedule,
        draws=2,
    )
    assert model.training
    assert model.weight.item() == pytest.approx(before - 0.5 * 2.0)
    assert schedule.last_epoch == 1


def test_the_archive_that_the_readme_shows_how_to_make_is_read_back(tmp_path):
    np = pytest.importorskip("numpy")
    pytest.importorskip("PIL")
    text = (Path(benchmarks.__file__).parent / "README.md").read_text()
    namespace = {}
    exec(text.partition("```python\n")[2].partition("```")[0], namespace)
    pixels = np.random.default_rng(0).integers(0, 256, (2000, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(2000) % 10
    namespace["write_archive"](tmp_path / "cifar10_test_lossless_1000.zip", pixels, labels)
    found = data.cifar10(train=False, data=tmp_path)
    assert np.array_equal(found.pixels.permute(0, 2, 3, 1).numpy(), pixels)
    assert found.labels.tolist() == labels.tolist()
    assert found.evenly(500).labels.tolist() == labels[::4].tolist()


def test_what_cannot_be_had_is_one_line_that_says_what_to_do(tmp_path):
    with pytest.raises(SystemExit, match=r"`.*cifar10_train_lossless_a\.zip` is missing: benchmarks/README\.md"):
        data.cifar10(train=True, data=tmp_path)

    def refused():
        raise OSError("no route to host\nand more")

    with pytest.raises(SystemExit, match=r"^CIFAR-10 cannot be .*\(OSError: no route to host\)\. .* --data; ") as error:
        fetch.fetched("CIFAR-10", refused)
    assert "\n" not in str(error.value)


def test_progress_in_a_pipe_is_a_line_now_and_then(monkeypatch, capsys):
    seconds = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(seconds))
    assert list(progress.track(range(10), "training")) == list(range(10))
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "training: 3 of 10, 1:33 left\ntraining: 7 of 10, 0:34 left\n"


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("continual", ["--tasks=2", "--images=200", "--epochs=1", "--seeds=1"]),
        ("from_scratch", ["--epochs=1", "--images=100", "--networks=2"]),
        ("posterior_structure", ["--data-sets", "yacht", "--splits=2", "--steps=50"]),
    ],
)
def test_a_script_prints_from_its_kept_figures_what_it_printed_when_it_found_them(
    script, options, data_folder, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("timm")
    main = importlib.import_module(f"benchmarks.quality.{script}").main
    kept = tmp_path / "kept.json"
    printed = []
    for arguments in ([f"--data={data_folder}", f"--output={kept}", *options], [f"--from={kept}"]):
        monkeypatch.setattr(sys, "argv", [script, "--markdown", "--threads=1", *arguments])
        main()
        printed.append(capsys.readouterr().out.partition("\n\n")[2].partition("\n\n")[0])
    assert printed[0] == printed[1]
    assert len(printed[0].splitlines()) > 2


def test_a_recipe_is_chosen_on_training_data_that_are_not_trained_on(data_folder):
    pytest.importorskip("timm")
    from benchmarks.quality import from_scratch

    network = next(network for network in from_scratch.NETWORKS if network.name == "MLP 2x400, MNIST")
    options = argparse.Namespace(images=50, validate=True, data=data_folder)
    train, judged = from_scratch.parts(network, options)
    assert len(train[0]) == len(judged[0]) == 50
    assert torch.equal(torch.cat([train[0], judged[0]]), network.images(True, data_folder, 100)[0])
