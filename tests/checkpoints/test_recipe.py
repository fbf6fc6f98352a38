"""A recipe makes the model that it names and can do nothing else, even where it comes from a hostile file."""

import pytest
import torch
import torchvision.models as models

from bnnify.checkpoints.architectures.recipe import Recipe
from bnnify.errors import CheckpointError

DATA = {"library": "torchvision", "builder": "resnet18", "arguments": {"num_classes": 10}, "in_channels": 1}


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch):
    def download(*arguments, **options):
        raise AssertionError("a recipe downloads nothing")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)


def test_a_recipe_goes_through_a_file(tmp_path):
    recipe = Recipe.from_data(DATA)
    assert recipe == Recipe("torchvision", "resnet18", {"num_classes": 10}, 1)
    torch.save(recipe.as_data(), tmp_path / "recipe.pt")
    assert Recipe.from_data(torch.load(tmp_path / "recipe.pt", weights_only=True)) == recipe


def test_data_that_is_no_recipe_is_refused():
    for change in [
        {"library": "os"},
        {"library": ["torchvision"]},
        {"builder": "system"},
        {"builder": "quantized_resnet18"},
        {"builder": "get_model"},
        {"builder": ["resnet18"]},
        {"builder": "hf-hub:somebody/model", "library": "timm", "in_channels": None},
        {"arguments": [("num_classes", 10)]},
        {"arguments": {"weights": "DEFAULT"}},
        {"arguments": {"weights_backbone": "DEFAULT"}},
        {"arguments": {"progress": True}},
        {"arguments": {"pretrained": True}, "library": "timm", "in_channels": None},
        {"arguments": {"checkpoint_path": "file.pt"}, "library": "timm", "in_channels": None},
        {"arguments": {"norm_layer": "torch.nn.BatchNorm2d"}},
        {"arguments": {"num_classes": 10**12}},
        {"arguments": {"num_classes": -1}},
        {"arguments": {"num_classes": True}},
        {"arguments": {"num_classes": 10.0}},
        {"arguments": {"num_classes": "10"}},
        {"arguments": {"num_classes": None}},
        {"arguments": {"aux_logits": 1}},
        {"arguments": {7: 7}},
        {"arguments": {"image_size": 10**6}},
        {"in_channels": 10**9},
        {"in_channels": "3"},
        {"in_channels": 3, "library": "timm"},
        {"more": 1},
    ]:
        with pytest.raises(CheckpointError) as caught:
            Recipe.from_data(DATA | change)
        assert str(caught.value).isprintable()


def test_foreign_data_is_refused():
    for data in [None, [], "resnet18", {}, {"library": "torchvision"}, DATA | {1: 2}]:
        with pytest.raises(CheckpointError, match="not a recipe"):
            Recipe.from_data(data)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(CheckpointError, match="timm has the model's builder and cannot be imported"):
        Recipe("timm", "vit_tiny_patch16_224").build()


@pytest.mark.parametrize(
    "recipe",
    [Recipe("torchvision", "resnet18", {"image_size": 64}), Recipe("torchvision", "vit_b_16", {"image_size": 7})],
)
def test_what_a_builder_refuses_is_an_error_of_the_checkpoint(recipe):
    with pytest.raises(CheckpointError, match=f"{recipe.builder}.* cannot be made"):
        recipe.build()


def test_build_makes_the_model_of_the_builder_with_the_adapted_input():
    model = Recipe("torchvision", "resnet18", {"num_classes": 10}, in_channels=1).build()
    assert type(model) is models.ResNet
    assert model.eval()(torch.randn(1, 1, 32, 32)).shape == (1, 10)
    assert 0 < model.conv1.weight.std() < 1


def test_on_the_meta_device_weights_have_no_storage_and_computed_buffers_have_values():
    with torch.device("meta"):
        model = Recipe("torchvision", "swin_t").build()
        assert torch.empty(0).is_meta
    assert all(parameter.is_meta for parameter in model.parameters())
    index = models.swin_t(weights=None).features[1][0].attn.relative_position_index
    assert torch.equal(model.features[1][0].attn.relative_position_index, index)


def test_buffers_that_no_state_dict_holds_have_values_in_timm_too():
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = Recipe("timm", "levit_128s").build()
    real = timm.create_model("levit_128s")
    kept = {name: b for name, b in real.named_buffers() if name not in real.state_dict()}
    assert kept
    made = dict(model.named_buffers())
    assert all(torch.equal(made[name], value) for name, value in kept.items())
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    "name", ["regnet_y_400mf", "fasterrcnn_mobilenet_v3_large_fpn", "ssdlite320_mobilenet_v3_large"]
)
def test_builders_that_compute_or_have_a_pretrained_backbone_are_made_on_the_meta_device(name):
    with torch.device("meta"):
        model = Recipe("torchvision", name).build()
    assert all(parameter.is_meta for parameter in model.parameters())


def test_check_compares_with_the_tensors_of_the_file_at_no_cost():
    recipe = Recipe("torchvision", "resnet18", {"num_classes": 2**20})
    file = {name: torch.zeros(()).expand(shape) for name, shape in Recipe("torchvision", "resnet18").shapes().items()}
    Recipe("torchvision", "resnet18").check({n: v for n, v in file.items() if "num_batches" not in n})
    with pytest.raises(CheckpointError, match=r"of another shape: `fc.weight` \(1000, 512\) for \(1048576, 512\)"):
        recipe.check(file)
