"""A state_dict is recognised as its builder's, whatever head and input it was given; everything else is refused."""

import inspect
from importlib.util import find_spec

import pytest
import torch
import torchvision.models as models
from torch import nn
from torch.nn.modules.conv import _ConvNd

from bnnify.checkpoints.architectures import known_shapes
from bnnify.checkpoints.architectures import recognition as module
from bnnify.checkpoints.architectures.recipe import Recipe
from bnnify.checkpoints.architectures.recognition import recognise
from bnnify.errors import CheckpointError

# torchvision's, about how googlenet and inception_v3 initialise their weights.
pytestmark = pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")

BUILDERS = [name for name in models.list_models() if not name.startswith("quantized_")]
CLASSIFIERS = models.list_models(module=models)
OTHERS = [name for name in BUILDERS if name not in CLASSIFIERS]

# They differ in the size that images are brought to.
IDENTICAL = {"fasterrcnn_mobilenet_v3_large_fpn", "fasterrcnn_mobilenet_v3_large_320_fpn"}


def original(name, **arguments):
    """The model as torchvision makes it, without weights and without storage."""
    builder = models.get_model_builder(name)
    arguments |= dict.fromkeys({"weights", "weights_backbone"} & inspect.signature(builder).parameters.keys())
    if name.startswith("regnet"):  # their widths are computed with tensors, which the meta device does not hold
        with pytest.importorskip("accelerate").init_empty_weights():
            return builder(**arguments)
    with torch.device("meta"):
        return builder(**arguments)


def file_of(model):
    """The state_dict of a model as a file would hold it, but that its tensors take no memory."""
    return with_shapes({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})


def with_shapes(shapes):
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}


def replace_heads(model, classes):
    """What people do: put a new layer in the place of the last one, and of those of the auxiliary heads."""
    for part in [model, *(child for name, child in model.named_children() if name.lower().startswith("aux"))]:
        layers = [n for n, m in part.named_modules() if isinstance(m, nn.Linear) or n == "classifier.1"]
        parent, _, attribute = layers[-1].rpartition(".")
        old = getattr(part.get_submodule(parent), attribute)
        with torch.device("meta"):
            if isinstance(old, nn.Linear):
                new = nn.Linear(old.in_features, classes, bias=old.bias is not None)
            else:
                new = nn.Conv2d(old.in_channels, classes, old.kernel_size)
        setattr(part.get_submodule(parent), attribute, new)


def replace_input(model, channels):
    name, old = next((name, module) for name, module in model.named_modules() if isinstance(module, _ConvNd))
    parent, _, attribute = name.rpartition(".")
    sizes = old.out_channels, old.kernel_size, old.stride, old.padding
    with torch.device("meta"):
        new = type(old)(channels, *sizes, bias=old.bias is not None)
    setattr(model.get_submodule(parent), attribute, new)


def family(name):
    return models.get_model_builder(name).__module__.rpartition(".")[2]


@pytest.mark.parametrize("of", sorted({family(name) for name in CLASSIFIERS}))
def test_every_classifier_is_recognised_with_its_own_or_another_head_and_input(of):
    for name in [name for name in CLASSIFIERS if family(name) == of]:
        model = original(name)
        found = [recognise(file_of(model))]
        replace_heads(model, 10)
        found.append(recognise(file_of(model)))
        replace_input(model, 1)
        found.append(recognise(file_of(model)))
        recipes = [
            Recipe("torchvision", name, *more) for more in ((), ({"num_classes": 10},), ({"num_classes": 10}, 1))
        ]
        assert [(each.recipe, each.same) for each in found] == [(recipe, ()) for recipe in recipes]


@pytest.mark.parametrize("of", sorted({family(name) for name in OTHERS}))
def test_every_other_builder_is_recognised(of):
    for name in [name for name in OTHERS if family(name) == of]:
        recognition = recognise(file_of(original(name)))
        assert {recognition.recipe.builder, *recognition.same} == (IDENTICAL if name in IDENTICAL else {name})
        assert (recognition.recipe.arguments, recognition.recipe.in_channels) == ({}, None)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("googlenet", {"aux_logits": False}),
        ("inception_v3", {"aux_logits": False, "num_classes": 5}),
        ("fcn_resnet50", {"aux_loss": True}),
        ("deeplabv3_mobilenet_v3_large", {"aux_loss": True, "num_classes": 4}),
        ("lraspp_mobilenet_v3_large", {"num_classes": 5}),
        ("fasterrcnn_resnet50_fpn", {"num_classes": 2}),
        ("maskrcnn_resnet50_fpn_v2", {"num_classes": 5}),
        ("keypointrcnn_resnet50_fpn", {"num_classes": 3, "num_keypoints": 5}),
        ("ssdlite320_mobilenet_v3_large", {"num_classes": 5}),
        ("vit_b_16", {"num_classes": 10, "image_size": 384}),
        ("vit_h_14", {"image_size": 518}),
        ("swin3d_t", {"num_classes": 101}),
    ],
)
def test_arguments_are_read_from_the_shapes(name, arguments):
    recipe = recognise(file_of(original(name, **arguments))).recipe
    assert recipe == Recipe("torchvision", name, arguments)
    assert file_of(original(name, **arguments)).keys() == recipe.shapes().keys()


def test_one_adapted_input_is_no_other_number_of_classes():
    model = original("resnet18")
    replace_input(model, 4)
    assert recognise(file_of(model)).recipe == Recipe("torchvision", "resnet18", {}, 4)


def test_a_file_from_before_batches_were_counted_is_recognised():
    file = {name: value for name, value in file_of(original("resnet18")).items() if "num_batches" not in name}
    assert recognise(file).recipe == Recipe("torchvision", "resnet18")


def test_what_no_state_dict_shows_is_said():
    file = file_of(original("fasterrcnn_resnet50_fpn"))
    assert recognise(file).notes == ()
    frozen = {name: value for name, value in file.items() if not name.endswith("num_batches_tracked")}
    assert "BatchNorm was frozen" in recognise(frozen).notes[0]
    assert "transform_input" in recognise(file_of(original("googlenet"))).notes[0]


@pytest.fixture
def without_timm(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "timm" else find_spec(name))


def refusal(file):
    with pytest.raises(CheckpointError) as caught:
        recognise(file)
    message = str(caught.value)
    assert message.isprintable()  # one line, and nothing that a terminal would obey
    assert len(message) < 2000
    return message


def test_an_unknown_model_is_refused_with_the_nearest_and_what_to_do(without_timm):
    narrow = {f"layer{i}.0.conv{j}.weight": (8 * i, 8 * i, 3, 3) for i in (1, 2, 3, 4) for j in (1, 2)}
    message = refusal(with_shapes({"conv1.weight": (16, 3, 3, 3), **narrow, "linear.weight": (10, 32)}))
    assert "Nearest is torchvision resnet" in message
    assert "unexpected: `linear.weight`" in message
    assert "--model package.module:factory" in message
    assert "--model-args" in message


def test_a_builder_of_another_width_is_named(without_timm):
    file = file_of(original("mobilenet_v2", width_mult=0.5))
    message = refusal(file)
    assert "Nearest is torchvision mobilenet_v2: 58 of its 314 tensors fit" in message
    assert "of another shape: `features.0.0.weight` (16, 3, 3, 3) for (32, 3, 3, 3)" in message


def test_a_head_that_no_builder_makes_is_refused_by_name(without_timm):
    model = original("resnet18")
    with torch.device("meta"):
        model.fc = nn.Sequential(nn.Dropout(), nn.Linear(512, 10))
    message = refusal(file_of(model))
    assert "Nearest is torchvision resnet18: 120 of its 122 tensors fit" in message
    assert "missing: `fc.weight`, `fc.bias`; unexpected: `fc.1.weight`, `fc.1.bias`" in message


def test_part_of_a_model_is_refused(without_timm):
    file = file_of(original("squeezenet1_1"))
    message = refusal({name: value for name, value in file.items() if not name.startswith("classifier")})
    assert "Nearest is torchvision squeezenet1_1" in message
    assert "missing: `classifier.1.weight`, `classifier.1.bias`" in message


def layers(**shapes):
    """The weights and biases of layers, by name."""
    return with_shapes(
        {
            f"{name}.{kind}": shape[: 4 if kind == "weight" else 1]
            for name, shape in shapes.items()
            for kind in ("weight", "bias")
        }
    )


FAR = {
    "a small convolutional network": layers(
        conv1=(32, 1, 3, 3), conv2=(64, 32, 3, 3), conv3=(128, 64, 3, 3), fc1=(128, 512), fc2=(10, 128)
    ),
    "a table of embeddings and layers": with_shapes(
        {f"embeds.{i}.weight": (9, 4) for i in range(2)}
        | {
            f"layers.{i}.{kind}": (64, 64)[: 2 if kind == "weight" else 1]
            for i in range(12)
            for kind in ("weight", "bias")
        }
    ),
    "a sequence without names": layers(**{"0": (300, 100), "2": (200, 300), "4": (10, 200)}),
    "an LSTM": with_shapes({"embed.weight": (1000, 64), "lstm.weight_ih_l0": (256, 64), "fc.weight": (2, 64)}),
}


@pytest.mark.parametrize("file", FAR.values(), ids=FAR)
def test_nothing_is_called_near_that_is_not(file):
    message = refusal(file)
    assert "None is near" in message
    assert "Nearest" not in message
    assert "--model package.module:factory" in message
    assert len(message) < 400


def test_how_much_of_the_names_agrees_is_said_where_the_shapes_do_not(without_timm):
    model = original("resnet18")
    narrow = {name: tuple(max(1, size // 4) for size in value.shape) for name, value in file_of(model).items()}
    message = refusal(with_shapes({name: shape for name, shape in narrow.items() if "num_batches" not in name}))
    assert (
        "Nearest is torchvision resnet18: 0 of its 122 tensors fit, though 102 of the file's 102 names are its"
        in message
    )


@pytest.mark.parametrize("prefix", ["backbone.", "a.b."])
def test_a_prefix_that_all_names_share_is_looked_through(prefix):
    file = {prefix + name: value for name, value in file_of(original("squeezenet1_1", num_classes=7)).items()}
    recognition = recognise(file)
    assert (recognition.recipe, recognition.prefix) == (
        Recipe("torchvision", "squeezenet1_1", {"num_classes": 7}),
        prefix,
    )
    unknown = {prefix + name: value for name, value in FAR["an LSTM"].items()}
    assert f"not recognised, with `{prefix}` or without" in refusal(unknown)


def test_of_an_unknown_file_few_models_are_made(monkeypatch):
    """Making all of them takes minutes; here a model is looked at to the first kernel that the file does not have."""
    made = []
    monkeypatch.setattr(known_shapes, "_known", {})
    monkeypatch.setattr(known_shapes, "_partial_shapes", {})
    shapes = Recipe.shapes
    monkeypatch.setattr(Recipe, "shapes", lambda self, *watch: (shapes(self, *watch), made.append(str(self)))[0])
    for file in FAR.values():
        refusal(file)
    assert len(made) < 60


def test_garbage_is_refused_in_one_line(without_timm):
    for file in [
        {},
        {"epoch": 3, "fc.weight": [1.0]},
        {1: torch.zeros(2), None: torch.zeros(2)},
        {"conv1.weight": torch.tensor(1.0)},
        {"\x1b[31m\nfc.weight": torch.zeros(3)},
        {"bn1.num_batches_tracked": torch.tensor(0)},
        {"x" * 10_000: torch.zeros(0, 3)},
        {"conv1.weight": torch.zeros(()).expand(2**40, 3, 7, 7), "fc.weight": torch.zeros(()).expand(2**40, 512)},
        {"a.weight": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged)},
        {"a.weight": torch.sparse_coo_tensor(size=(3, 4), check_invariants=True)},
        {f"{i}.{'?' * i}": torch.zeros([1] * (i % 9)) for i in range(200)},
    ]:
        refusal(file)


def test_a_head_of_any_size_costs_no_memory(without_timm):
    file = file_of(original("resnet18"))
    file |= {"fc.weight": torch.zeros(()).expand(10**12, 512), "fc.bias": torch.zeros(()).expand(10**12)}
    assert "Nearest is torchvision resnet18" in refusal(file)


def test_without_either_library_it_says_so(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert "neither torchvision nor timm is installed" in refusal({"fc.weight": torch.zeros(3, 3)})


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("levit_128s", {}),
        ("convnext_atto", {"num_classes": 10}),
        ("regnetx_002", {"num_classes": 0}),
        ("edgenext_xx_small", {"num_classes": 10, "in_chans": 1}),
        ("repvit_m0_9", {"num_classes": 10}),
        ("resnet10t", {"in_chans": 1}),
    ],
)
def test_models_of_timm_are_recognised(name, arguments):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name, **arguments)
    recognition = recognise(file_of(model))
    assert (recognition.recipe, recognition.same) == (Recipe("timm", name, arguments), ())


def test_builders_of_timm_that_differ_in_no_tensor_are_named():
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        file = file_of(timm.create_model("xcit_nano_12_p16_384"))
    recognition = recognise(file)
    assert {recognition.recipe.builder, *recognition.same} == {"xcit_nano_12_p16_224", "xcit_nano_12_p16_384"}
