"""Data of every kind, and what is wrong with them."""

import json
import re
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from PIL import Image

import bnnify
from bnnify.cli.command import main
from bnnify.cli.data import Request, read_data

from .conftest import of


def predicted(run, model, *arguments):
    return run("predict", f"{model}.bnn.pt", *of(model), "-n", 2, *arguments)["predictions"]


def test_a_table_an_array_and_a_loader_of_the_same_numbers_give_the_same_predictions(folder, run):
    frame = pandas.read_csv("classes.csv")
    frame.to_parquet("classes.parquet")
    frame.drop(columns="y").to_csv("inputs.csv", index=False)
    frame.rename(columns={"y": "kind"}).to_csv("renamed.tsv", sep="\t", index=False)
    rows = predicted(run, "classifier", "--data", "classes.csv", "--likelihood", "logits")
    assert len(rows) == 60
    for source in ("classes.parquet", "classes.npz", "inputs.csv"):
        found = predicted(run, "classifier", "--data", source, "--likelihood", "logits")
        assert [row["probability"] for row in found] == pytest.approx([row["probability"] for row in rows], rel=1e-4)
    kind = ["--data", "renamed.tsv", "--target", "kind", "--likelihood", "logits"]
    assert predicted(run, "classifier", *kind) == rows


def test_a_loader_of_ones_own_is_read_as_it_is(folder, run):
    import cli_models

    rows = predicted(run, "classifier", "--data", "cli_models:loader", "--likelihood", "logits")
    bnn = bnnify.load("classifier.bnn.pt", cli_models.classifier())
    wanted = bnn.predict(cli_models.loader(), 2, likelihood="logits", seed=0)
    torch.testing.assert_close(torch.tensor([row["entropy"] for row in rows]), wanted.predictive_entropy)
    tuned = ["-n", 2, "--limit", 20]
    assert run("tune", "classifier.bnn.pt", *of("classifier"), "--data", "cli_models:loader", *tuned)["num_data"] == 20


def test_whole_numbers_and_names_are_classes_and_real_numbers_a_regression(folder, run, capsys):
    tuned = [*of("classifier"), "-n", 2, "--force", "-o", "out.bnn.pt"]
    frame = pandas.read_csv("classes.csv")
    frame.assign(y=frame["y"].map({0: "no", 1: "yes", 2: "maybe"})).to_csv("names.csv", index=False)
    run("tune", "classifier.bnn.pt", "--data", "names.csv", *tuned)
    settings = bnnify.load("out.bnn.pt", _made("classifier")).history[-1]["settings"]
    assert settings["likelihood"] == "logits"
    assert settings["classes"] == ["maybe", "no", "yes"]
    named = ["--data", "names.csv", "--classes", "no,yes,maybe"]
    assert run("tune", "classifier.bnn.pt", *named, *tuned)["before"] == pytest.approx(
        run("tune", "classifier.bnn.pt", "--data", "classes.csv", *tuned)["before"]
    )
    assert main(["tune", "regressor.bnn.pt", *of("regressor"), "--data", "amounts.csv", "-n", "2"]) == 0
    said = capsys.readouterr().err
    assert "the output is read as values, noise " in said
    assert re.search(r"tuning: about \d+ s for 52 forwards \(13 passes × 2 networks × 2 batches\)", said)


def _made(name):
    import cli_models

    return getattr(cli_models, name)()


def test_images_may_stand_in_a_table(photos, run):
    paths = sorted(Path("test").rglob("*.png"))
    frame = pandas.DataFrame({"file": map(str, paths), "label": [path.parent.name for path in paths]})
    frame.to_csv("images.csv", index=False)
    small = ["--size", 64, "-n", 2]
    by_table = run("predict", "net.bnn.pt", "--data", "images.csv", *small)["predictions"]
    by_folder = run("predict", "net.bnn.pt", "--data", "test", *small)["predictions"]
    assert [row["entropy"] for row in by_table] == [row["entropy"] for row in by_folder]
    tuned = run("tune", "net.bnn.pt", "--data", "images.csv", *small)
    again = run("tune", "net.bnn.pt", "--data", "test", *small, "--force")
    assert tuned["before"] == again["before"]


def test_texts_are_read_with_the_tokenizer_of_the_directory_that_was_converted(tmp_path, monkeypatch, run, refused):
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a"]
    Path("words.txt").write_text("\n".join(words))
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1},
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(config).save_pretrained("bert")
    transformers.BertTokenizer("words.txt").save_pretrained("bert")
    lines = [{"text": "a good film", "label": "positive"}, {"text": "bad", "label": "negative"}] * 8
    Path("texts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert main(["-q", "convert", "bert"]) == 0
    assert run("tune", "bert.bnn.pt", "--data", "texts.jsonl", "-n", 2)["num_data"] == 16
    row = run("predict", "bert.tuned.bnn.pt", "--data", "texts.jsonl", "-n", 2)["predictions"][0]
    assert row["input"] == "a good film"
    assert row["class"] in ("negative", "positive")
    Path("bert").rename("elsewhere")
    assert "the tokenizer" in refused("predict", "bert.bnn.pt", "--data", "texts.jsonl")
    run("predict", "bert.bnn.pt", "--data", "texts.jsonl", "--tokenizer", "elsewhere", "-n", 2)


def broken(name, change):
    frame = pandas.read_csv("classes.csv")
    change(frame).to_csv(name, index=False)
    return name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: "absent.csv", "`absent.csv` is not there"),
        (lambda: "cli_models.py", "of no known kind. Data are a folder"),
        (lambda: broken("x.csv", lambda frame: frame.rename(columns={"y": "z"})), "Say with --target which column"),
        (lambda: broken("x.csv", lambda frame: frame.assign(y=frame["y"] + 1)), "class number 3, and the network"),
        (lambda: broken("x.csv", lambda frame: frame.assign(y=-1)), "class number -1; they count from 0"),
        (lambda: broken("x.csv", lambda frame: frame.assign(a="red")), "columns that are no numbers: a"),
        (lambda: broken("x.csv", lambda frame: frame.assign(b=frame["b"].where(frame["b"] > 0))), "empty cells in"),
        (lambda: broken("x.csv", lambda frame: frame.drop(columns="d")), "does not take these data, a batch of shape"),
        (lambda: broken("x.csv", lambda frame: frame[:0]), "has no rows"),
        (lambda: broken("x.csv", lambda frame: frame.assign(a="absent.png")), "which is not there"),
        (lambda: "cli_models:absent", "Cannot make a loader with --data cli_models:absent"),
        (lambda: "cli_models:number", "made 0, not a loader that gives batches"),
        (lambda: Path("x.npz").write_bytes(b"nothing") and "x.npz", "Cannot read the arrays in `x.npz`"),
        (lambda: np.savez("x.npz", a=np.ones(3), b=np.ones(3)) or "x.npz", "which array of `x.npz` is the target"),
        (lambda: Path("x.jsonl").write_text("{}\nno") and "x.jsonl", "Line 2 of `x.jsonl` is no JSON object"),
        (lambda: Path("x.jsonl").write_text('{"body": ""}') and "x.jsonl", "Say with --text which key"),
    ],
)
def test_data_that_cannot_be_used_are_named_and_nothing_is_written(folder, refused, make, message):
    source = make()
    before = set(folder.iterdir())
    assert message in refused("tune", "classifier.bnn.pt", *of("classifier"), "--data", source, "-n", 2)
    assert set(folder.iterdir()) - before <= {folder / "__pycache__"}


def test_what_the_output_means_is_asked_for_where_nothing_tells(folder, refused):
    pandas.read_csv("classes.csv").drop(columns="y").to_csv("inputs.csv", index=False)
    assert "Say it with --likelihood" in refused(
        "predict", "classifier.bnn.pt", *of("classifier"), "--data", "inputs.csv"
    )


def test_the_columns_of_a_table_are_found_by_the_names_that_the_file_holds(folder, run, refused):
    frame = pandas.read_csv("amounts.csv")
    tuned = run("tune", "regressor.bnn.pt", *of("regressor"), "--data", "amounts.csv", "-n", 2)["output"]
    rows = run("predict", tuned, *of("regressor"), "--data", "amounts.csv", "-n", 2)["predictions"]
    frame[[*"dacb", "y"]].assign(more=1.0).to_csv("mixed.csv")  # with the index as a column of its own
    mixed = run("predict", tuned, *of("regressor"), "--data", "mixed.csv", "-n", 2)["predictions"]
    assert mixed == rows
    frame.drop(columns="c").to_csv("less.csv", index=False)
    assert "lacks the columns c" in refused("predict", tuned, *of("regressor"), "--data", "less.csv")


def test_targets_of_a_regression_are_numbers(folder, run, refused):
    tuned = run("tune", "regressor.bnn.pt", *of("regressor"), "--data", "amounts.csv", "-n", 2)["output"]
    frame = pandas.read_csv("amounts.csv")
    frame.assign(y=[f"{amount:.2f} EUR" for amount in frame["y"]]).to_csv("text.csv", index=False)
    for file in tuned, "regressor.bnn.pt":
        told = refused("evaluate", file, *of("regressor"), "--data", "text.csv", "--likelihood", "values")
        assert "EUR', which is no number" in told
    assert "Nothing tells" in refused("evaluate", "regressor.bnn.pt", *of("regressor"), "--data", "text.csv")
    frame.assign(y=frame["y"].round().astype(int)).to_csv("whole.csv", index=False)
    assert run("evaluate", tuned, *of("regressor"), "--data", "whole.csv", "-n", 2)["num_data"] == 60


def test_a_class_may_be_called_none_and_an_empty_cell_is_no_class(folder, run, refused):
    frame = pandas.read_csv("classes.csv")
    names = ["None", "NA", "high"]
    frame.assign(y=[names[number] for number in frame["y"]]).to_csv("named.csv", index=False)
    given = [*of("classifier"), "--classes", ",".join(names), "-n", 2]
    whole = run("evaluate", "classifier.bnn.pt", *given, "--data", "classes.csv")["rows"]
    assert run("evaluate", "classifier.bnn.pt", *given, "--data", "named.csv")["rows"] == whole
    frame.assign(y=["", *[names[number] for number in frame["y"]][1:]]).to_csv("empty.csv", index=False)
    assert "a target that is empty" in refused("evaluate", "classifier.bnn.pt", *given, "--data", "empty.csv")


def test_a_grey_image_of_16_bits_is_as_bright_as_one_of_8(photos, run, refused):
    ramp = np.linspace(0, 255, 64 * 64).reshape(64, 64)
    Image.fromarray(ramp.astype("uint8")).save("eight.png")
    Image.fromarray((ramp * 257).astype("uint16")).save("sixteen.png")
    Image.fromarray(ramp.astype("float32")).save("real.tiff")
    names = ["eight.png", "sixteen.png"]
    eight, sixteen = run("predict", "net.bnn.pt", "-n", 2, "--size", 64, *names)["predictions"]
    assert sixteen["probability"] == pytest.approx(eight["probability"], abs=2e-3)
    assert "nothing tells the range" in refused("predict", "net.bnn.pt", "real.tiff")


def test_a_generator_gives_all_of_its_batches_each_time(folder, run):
    Path("own.py").write_text("import cli_models\n\ndef made():\n    yield from cli_models.loader()\n")
    given = ["classifier.bnn.pt", *of("classifier"), "-n", 2, "--data"]
    found = [run("evaluate", *given, data) for data in ("own:made", "cli_models:loader")]
    assert found[0] == found[1]
    assert found[0]["num_data"] == 30


def test_what_is_read_is_never_written_over(folder, refused):
    before = Path("classes.csv").read_text()
    for output in ["-o", "classes.csv"], ["--html", "classes.csv"]:
        told = refused("predict", "classifier.bnn.pt", *of("classifier"), "--data", "classes.csv", "--force", *output)
        assert "it is the input" in told
    Path("kept.png").write_text("something")
    told = refused("evaluate", "classifier.bnn.pt", *of("classifier"), "--data", "classes.csv", "--plot", "kept.png")
    assert "exists" in told
    assert "exists" in refused("inspect", "classifier.bnn.pt", "--plot", "kept.png")
    assert "exists" in refused("demo", "--picture", "kept.png")
    Path("read").mkdir()
    told = refused("evaluate", "classifier.bnn.pt", "--data", "read", "--plot", "read/new.png")
    assert "one of the images in the input" in told
    assert "a picture ends in" in refused("inspect", "classifier.bnn.pt", "--plot", "picture.pt")
    assert Path("classes.csv").read_text() == before
    assert Path("kept.png").read_text() == "something"


def test_a_text_may_hold_any_separator_but_the_end_of_a_line(tmp_path):
    rows = [{"text": "one\u2028two\x0bthree", "label": 0}, {"text": "four", "label": 1}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "x.jsonl").write_text("\ufeff" + lines, encoding="utf-8")
    with pytest.raises(bnnify.ArgumentError, match="need the tokenizer"):  # all rows were read
        read_data(str(tmp_path / "x.jsonl"), Request(image=lambda image: image))
    (tmp_path / "latin.jsonl").write_bytes('{"text": "\xe4"}'.encode("latin-1"))
    with pytest.raises(bnnify.ArgumentError, match="is not in UTF-8"):
        read_data(str(tmp_path / "latin.jsonl"), Request(image=lambda image: image))


def test_images_may_stand_before_and_after_options(photos, run):
    names = ["test/red/0.png", "test/blue/0.png"]
    before = run("predict", "net.bnn.pt", *names, "-n", 2)["predictions"]
    assert len(before) == 2
    assert run("predict", "net.bnn.pt", "-n", 2, *names)["predictions"] == before
    with pytest.raises(SystemExit):
        main(["inspect", "net.bnn.pt", "more"])
