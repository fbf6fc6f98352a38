"""The whole way with a folder of images: convert, tune, predict, evaluate, fine-tune, and back."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image

import bnnify
from bnnify.cli.data.preprocessing import preprocessing_of

SMALL = ["--size", 64, "-n", 2]


def test_from_a_checkpoint_and_a_folder_to_an_answer_and_back(photos, run):
    tuned = run("tune", "net.bnn.pt", "--data", "held_out", "--calibrate", "test", *SMALL)
    assert tuned["num_data"] == 12
    assert tuned["after"] <= tuned["before"] + 1e-6
    assert set(tuned["decisions"]) >= {"temperature", "conformal_sets"}
    page = ["--sort", "--html", "page.html", "-o", "found.csv"]
    assert run("predict", "net.tuned.bnn.pt", "--data", "test", *page)["num_data"] == 12
    rows = list(csv.DictReader(Path("found.csv").open()))
    entropies = [float(row["entropy"]) for row in rows]
    assert entropies == sorted(entropies, reverse=True)
    assert {row["class"] for row in rows} <= {"blue", "red"}
    assert {row["input"] for row in rows} == {f"{c}/{n}.png" for c in ("blue", "red") for n in range(6)}
    judged = ["--data", "test", "--ood", "train", "--bootstrap", 10, "--plot", "r.png"]
    report = run("evaluate", "net.tuned.bnn.pt", *judged)
    assert report["num_data"] == 12
    assert Path("r.png").read_bytes().startswith(b"\x89PNG")
    training = ["--validation", "held_out", "--epochs", 1, "-n", 2, "-o", "fine.bnn.pt"]
    assert run("finetune", "net.tuned.bnn.pt", "--data", "train", *training)["epochs"] == 1

    assert [entry["what"] for entry in run("inspect", "fine.bnn.pt")["history"]] == ["convert", "tune", "finetune"]
    assert bnnify.load("fine.bnn.pt").decisions == {}
    run("collapse", "fine.bnn.pt", "-o", "back.pt")
    torchvision.models.squeezenet1_1(num_classes=2).load_state_dict(torch.load("back.pt", weights_only=True))


def test_predictions_are_those_of_the_library_on_the_same_images(photos, run):
    found = run("predict", "net.bnn.pt", "--data", "test", *SMALL, "--seed", 3)["predictions"]
    weights = torchvision.models.SqueezeNet1_1_Weights.DEFAULT
    preset = weights.transforms(crop_size=64, resize_size=73)
    images = torch.stack([preset(Image.open(path).convert("RGB")) for path in sorted(Path("test").rglob("*.png"))])
    wanted = bnnify.load("net.bnn.pt").predict([images], 2, likelihood="logits", seed=3)
    torch.testing.assert_close(torch.tensor([row["probability"] for row in found]), wanted.mean.amax(1))
    torch.testing.assert_close(torch.tensor([row["entropy"] for row in found]), wanted.predictive_entropy)
    information = torch.tensor([row["mutual_information"] for row in found])
    torch.testing.assert_close(information, wanted.mutual_information, atol=1e-6, rtol=1e-3)


def test_the_page_holds_its_pictures_and_asks_nothing_of_a_server(photos, run):
    Path("test/blue/0.png").rename("test/blue/<b>&.png")
    Path("test/.thumbnails").mkdir()
    Path("test/.thumbnails/1.png").write_bytes(Path("test/blue/1.png").read_bytes())
    run("predict", "net.bnn.pt", "--data", "test", *SMALL, "--html", "page.html", "-o", "found.jsonl")
    page = Path("page.html").read_text()
    assert page.count('src="data:image/jpeg;base64,') == 12
    assert not re.search(r"https?://|<script|<b>", page)
    assert 'name="viewport"' in page
    assert len([json.loads(line) for line in Path("found.jsonl").read_text().splitlines()]) == 12


def test_single_images_are_predicted_under_the_names_of_the_classes_that_were_tuned_on(photos, run):
    run("tune", "net.bnn.pt", "--data", "held_out", "--limit", 4, *SMALL)
    (row,) = run("predict", "net.tuned.bnn.pt", "test/red/0.png", "-n", 2)["predictions"]
    assert row["class"] in ("blue", "red")


@pytest.mark.parametrize("builder", ["resnet18", "vit_b_16", "inception_v3"])
def test_the_preset_of_torchvision_is_what_its_weights_say(builder):
    from bnnify.checkpoints.architectures.recipe import Recipe

    image = Image.effect_noise((410, 350), 50).convert("RGB")
    ours = preprocessing_of(torch.nn.Conv2d(3, 1, 1), Recipe("torchvision", builder))
    theirs = torchvision.models.get_model_weights(builder).DEFAULT.transforms()
    assert torch.equal(ours(image), theirs(image))


def test_the_preset_of_timm_is_what_its_config_says():
    timm = pytest.importorskip("timm")
    from bnnify.checkpoints.architectures.recipe import Recipe

    model = timm.create_model("efficientnet_b0", pretrained=False)
    config = timm.data.resolve_data_config({}, model=model)
    image = Image.effect_noise((410, 350), 50).convert("RGB")
    ours = preprocessing_of(model, Recipe("timm", "efficientnet_b0"))
    torch.testing.assert_close(ours(image), timm.data.create_transform(**config)(image), atol=1e-6, rtol=0)


def test_of_a_network_for_grey_images_the_preset_has_one_channel():
    from bnnify.checkpoints.architectures.recipe import Recipe

    ours = preprocessing_of(torch.nn.Conv2d(1, 1, 1), Recipe("torchvision", "resnet18", in_channels=1), std=(0.5,))
    assert ours(Image.new("RGB", (300, 300))).shape == (1, 224, 224)
    assert ours.std == (0.5,)
    assert ours.mean == (pytest.approx((0.485 + 0.456 + 0.406) / 3),)


def test_what_is_wrong_with_images_is_named(photos, refused):
    def predict(*more):
        return refused("predict", "net.bnn.pt", *more, *SMALL)

    Path("empty").mkdir()
    assert "`empty` holds no images" in predict("--data", "empty")
    assert "`absent` is not there" in predict("--data", "absent")
    Path("test/red/broken.png").write_bytes(b"\x89PNG and nothing")
    assert "Cannot read the image `test/red/broken.png`" in predict("--data", "test")
    assert "either images, or data" in predict()
    Path("held_out/green").mkdir()
    Path("held_out/red/0.png").rename("held_out/green/0.png")
    assert "`held_out` has 3 classes (blue, green, red), and the network 2" in refused(
        "tune", "net.bnn.pt", "--data", "held_out", *SMALL
    )
    assert "the class 'green', which the network does not have: it has blue, red" in refused(
        "tune", "net.bnn.pt", "--data", "held_out", "--classes", "blue,red", *SMALL
    )
    assert "predictions are written as .csv or .jsonl" in predict("--data", "train", "-o", "found.xls")
    assert "its folder does not exist" in predict("--data", "train", "--html", "absent/page.html")
    Path("train/stray.png").write_bytes(Path("train/red/0.png").read_bytes())
    assert "the image stray.png, which is in none" in refused("tune", "net.bnn.pt", "--data", "train", *SMALL)
