"""Checkpoints of all origins are read as what they are, and written back as they were."""

import copy
import datetime
import decimal
import enum
import functools
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import warnings
import zipfile
from argparse import Namespace
from collections import OrderedDict, deque
from pathlib import Path, PurePosixPath

import pytest
import torch
import torchvision
from torch import nn

import bnnify
from bnnify.checkpoints.architectures.transformers_model import model_from_config
from bnnify.checkpoints.atomic import replace_atomically
from bnnify.checkpoints.foreign import read_write as foreign
from bnnify.checkpoints.foreign.layout import Layout


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


def prefixed(state_dict, prefix):
    return OrderedDict((prefix + name, value) for name, value in state_dict.items())


def equal(a, b):
    """Whether two contents are the same bit for bit, in type and order too."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def save(content, path, zipped=True):
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def written_back(found, folder, state_dict=None):
    """What torch reads in the file that is written of what was ``found`` in another one."""
    layout = Layout.from_data(found.layout.as_data())
    foreign.write(folder / "y.pt", layout, found.state_dict if state_dict is None else state_dict, found.rest)
    return torch.load(folder / "y.pt", weights_only=True, map_location="cpu")


@pytest.fixture(autouse=True)
def no_noise(recwarn, capfd):
    yield
    assert not recwarn.list
    assert capfd.readouterr() == ("", "")


# --- Where the weights stand ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [(), ("state_dict",), ("model_state_dict",), ("net",), ("run", "weights"), ("odd",)])
def test_it_is_found_and_comes_back_bit_for_bit(keys, tmp_path):
    for prefix in ["", "module.", "_orig_mod.", "model.", "module._orig_mod.", "model._orig_mod."]:
        for zipped in [True, False]:
            content = prefixed(network().state_dict(), prefix)
            for key in reversed(keys):
                content = {"epoch": 3, key: content, "best": [0.5, (1, None)], "lr": torch.tensor(0.1)}
            path = save(content, tmp_path / "x.pt", zipped)
            found = foreign.read(path)
            assert (found.layout.keys, found.layout.prefix) == (keys, prefix)
            assert found.layout.kind == ("torch" if zipped else "torch-legacy")
            assert equal(found.state_dict, OrderedDict(network().state_dict()))
            assert equal(written_back(found, tmp_path), content)
            assert zipfile.is_zipfile(tmp_path / "y.pt") == zipped


def test_a_whole_training_checkpoint_is_kept(tmp_path):
    model = nn.DataParallel(network())
    optimizer = torch.optim.Adam(model.parameters())
    model.module[3](torch.randn(1, 8)).sum().backward()
    optimizer.step()
    content = {
        "epoch": 3,
        "arch": "net",
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "history": {"loss": [0.1, 0.2], "best": torch.tensor(0.1)},
        "rng": torch.get_rng_state(),
        "names": {"a", "b"},
        "none": None,
        "bytes": b"x",
        "size": torch.Size([1, 2]),
        "dtype": torch.bfloat16,
        "text": "ä\ud800",
        "big": -(2**70),
    }
    found = foreign.read(save(content, tmp_path / "x.pt"))
    assert found.layout.prefix == "module."
    assert found.rest["optimizer"]["state"].keys() == content["optimizer"]["state"].keys()
    assert equal(written_back(found, tmp_path), content)


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        ({"state_dict": 1, "state_dict_ema": 2}, ("state_dict",)),
        ({"model": 1, "model_ema": 2, "normalizer": 2}, ("model",)),
        ({"params_ema": 2, "params": 1}, ("params",)),
        ({"model": {"state_dict": 1, "best": 3}, "shadow": 2}, ("model", "state_dict")),
        ({"whatever": 1, "step": 3}, ("whatever",)),
    ],
)
def test_the_usual_key_decides(content, keys, tmp_path):
    states = {1: {"w": torch.ones(2)}, 2: {"w": torch.zeros(2)}}

    def filled(value):
        return {k: filled(v) for k, v in value.items()} if isinstance(value, dict) else states.get(value, value)

    found = foreign.read(save(filled(content), tmp_path / "x.pt"))
    assert found.layout.keys == keys
    assert found.state_dict["w"].sum() == 2


def test_several_are_listed_and_one_may_be_chosen(tmp_path):
    path = save({"generator": {"sd": {"w": torch.ones(2)}}, "critic": {"v": torch.zeros(1)}}, tmp_path / "x.pt")
    with pytest.raises(bnnify.CheckpointError, match=r"several state_dicts: `generator\.sd`, `critic`.*--key"):
        foreign.read(path)
    found = foreign.read(path, key="generator.sd")
    assert found.layout.keys == ("generator", "sd")
    assert set(found.rest["critic"]) == {"v"}
    assert foreign.read(path, names=["v"]).layout.keys == ("critic",)
    with pytest.raises(bnnify.CheckpointError, match=r"no state_dict under `x`. It has `generator\.sd`"):
        foreign.read(path, key="x")


def test_the_models_names_tell_the_prefix_and_the_rest_is_kept(tmp_path):
    own = network().state_dict()
    content = {"state_dict": {**prefixed(own, "net.body."), "loss.weight": torch.ones(3)}, "epoch": 1}
    path = save(content, tmp_path / "x.pt")
    assert foreign.read(path).layout.prefix == ""
    found = foreign.read(path, names=own)
    assert found.layout.prefix == "net.body."
    assert found.state_dict.keys() == own.keys()
    assert set(found.rest["state_dict"]) == {"loss.weight"}
    assert equal(written_back(found, tmp_path), content)


def test_names_keep_a_prefix_that_is_the_models_own(tmp_path):
    path = save(prefixed(network().state_dict(), "model."), tmp_path / "x.pt")
    assert foreign.read(path, names=prefixed(network().state_dict(), "model.")).layout.prefix == ""


@pytest.mark.parametrize("prefix", ["model.", "net.", "net._orig_mod.", "module.net.module."])
def test_any_single_attribute_of_a_lightning_module_is_looked_through(prefix, tmp_path):
    state = {**prefixed(network().state_dict(), prefix), "loss.weight": torch.ones(3), "seen": torch.tensor(4)}
    if prefix.startswith("module."):
        state = prefixed(network().state_dict(), prefix)
    content = {"pytorch-lightning_version": "2.6", "state_dict": state}
    found = foreign.read(save(content, tmp_path / "x.ckpt"))
    assert found.layout.prefix == prefix
    assert equal(found.state_dict, OrderedDict(network().state_dict()))
    assert found.beside == [name for name in state if not name.startswith(prefix)]
    assert equal(written_back(found, tmp_path), content)


def test_a_lightning_module_of_two_parts_is_taken_whole(tmp_path):
    state = {**prefixed(network().state_dict(), "encoder."), **prefixed(network().state_dict(), "decoder.")}
    path = save({"pytorch-lightning_version": "2.6", "state_dict": state}, tmp_path / "x.ckpt")
    assert foreign.read(path).layout.prefix == ""


def test_weights_beside_numbers_in_one_mapping(tmp_path):
    content = {**network().state_dict(), "epoch": 3}
    found = foreign.read(save(content, tmp_path / "x.pt"))
    assert found.rest == {"epoch": 3}
    assert equal(written_back(found, tmp_path), content)


def test_versions_of_modules_come_through(tmp_path):
    model = nn.DataParallel(network())
    found = foreign.read(save({"state_dict": model.state_dict()}, tmp_path / "x.pt"))
    assert found.state_dict._metadata == network().state_dict()._metadata
    assert written_back(found, tmp_path)["state_dict"]._metadata == model.state_dict()._metadata


def test_metadata_that_loading_would_choke_on_is_left_out(tmp_path):
    state = network().state_dict()
    state._metadata["1"] = {"version": "x"}
    state._metadata["3"] = 3
    found = foreign.read(save(state, tmp_path / "x.pt"))
    network().load_state_dict(found.state_dict)


# --- What the model has and the file has not --------------------------------------------------------------------------


def test_what_an_old_file_lacked_is_not_added(tmp_path):
    state = network().state_dict()
    del state["1.num_batches_tracked"]
    found = foreign.read(save(state, tmp_path / "x.pt"))
    assert equal(written_back(found, tmp_path, network().state_dict()), state)


def test_a_tied_parameter_is_written_under_the_names_it_had(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    state = model.state_dict()
    del state["1.weight"]
    found = foreign.read(save(state, tmp_path / "x.pt"))
    assert list(written_back(found, tmp_path, model.state_dict())) == list(state)
    both = foreign.read(save(model.state_dict(), tmp_path / "x.pt"))
    assert both.state_dict["0.weight"].data_ptr() == both.state_dict["1.weight"].data_ptr()


# --- Values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_every_dtype_and_shape_and_stride_comes_through(zipped, tmp_path):
    base = torch.randn(4, 6)
    # float8 and the unsigned integers have an untyped storage, which the old format cannot write.
    dtypes = ["float64", "float32", "float16", "bfloat16", "int64", "int8", "uint8", "bool", "complex64"]
    dtypes += ["float8_e4m3fn", "uint16"] if zipped else []
    state = {name: torch.randn(3).to(getattr(torch, name)) for name in dtypes}
    state |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(3.0), "t": base.t(), "part": base[1:3, ::2]}
    state |= {"expanded": torch.ones(1).expand(5), "nan": torch.tensor([float("nan"), float("inf")])}
    found = foreign.read(save(state, tmp_path / "x.pt", zipped))
    for name, value in state.items():
        again = found.state_dict[name]
        assert (again.dtype, again.shape, again.stride()) == (value.dtype, value.shape, value.stride())
        if value.numel():
            ours, theirs = (x.contiguous().reshape(-1).view(torch.uint8) for x in (again, value))
            assert torch.equal(ours, theirs)
    assert foreign.not_finite(found.state_dict) == ["nan"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64, torch.float8_e5m2])
def test_what_is_not_finite_is_named(dtype):
    for value in [float("nan"), float("inf"), -float("inf")]:
        bad = torch.zeros(3, 4).index_fill_(1, torch.tensor([2]), value).to(dtype)
        state = {
            "a": torch.zeros(3).to(dtype),
            "b": bad,
            "c": torch.arange(3),
            "e": torch.empty(0),
            "x_extra_state": {},
        }
        assert foreign.not_finite(state) == ["b"]


def test_weights_from_a_gpu_are_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:7")
    for zipped in (True, False):
        path = save(network().state_dict(), tmp_path / "x.pt", zipped)
        assert all(value.device.type == "cpu" for value in foreign.read(path).state_dict.values())


def test_parameters_in_place_of_tensors(tmp_path):
    path = save(dict(network().named_parameters()), tmp_path / "x.pt")
    assert not any(value.requires_grad for value in foreign.read(path).state_dict.values())


def test_namespaces_and_numpy_scalars_are_read_as_plain_data(tmp_path):
    numpy = pytest.importorskip("numpy")
    rest = {"args": Namespace(lr=0.1, names=["a"]), "best": numpy.float64(0.7), "half": numpy.float16(0.5)}
    content = {"model": network().state_dict(), "ok": numpy.bool_(True), **rest}
    found = foreign.read(save(content, tmp_path / "x.pt"))
    assert {k: v for k, v in found.rest.items() if k != "model"} == {
        "args": {"lr": 0.1, "names": ["a"]},
        "best": 0.7,
        "half": 0.5,
        "ok": True,
    }


class Phase(enum.Enum):
    TRAINING = 1


class Options(dict):
    pass


def bystanders():
    numpy = pytest.importorskip("numpy")
    parameter = nn.Parameter(torch.ones(1))
    return {
        "a date": (datetime.date(2026, 1, 1), "datetime.date"),
        "a path": (PurePosixPath("/data"), "pathlib.PurePosixPath"),
        "an array": (numpy.ones(3), "numpy.ndarray"),
        "a dtype of numpy": (numpy.dtype("f4"), "numpy.dtype"),
        "a text of numpy": (numpy.str_("x"), "numpy.core.multiarray.scalar"),
        "an enum": (Phase.TRAINING, f"{__name__}.Phase"),
        "a key that is an enum": ({Phase.TRAINING: 1}, f"{__name__}.Phase"),
        "a set of enums": ({Phase.TRAINING}, f"{__name__}.Phase"),
        "a tuple with an enum": ((1, Phase.TRAINING), f"{__name__}.Phase"),
        "a class": (Phase, f"{__name__}.Phase"),
        "a mapping of a class": (Options(a=1), f"{__name__}.Options"),
        "a deque": (deque([1, 2]), "collections.deque"),
        "a slice": (slice(0, 3), "builtins.slice"),
        "a function": (os.path.join, "posixpath.join"),
        "a partial": (functools.partial(int, "3"), "functools.partial"),
        "a decimal": (decimal.Decimal("1.5"), "decimal.Decimal"),
        "an optimizer": (torch.optim.Adam([parameter]), "torch.optim.adam.Adam"),
        "a loss": (nn.CrossEntropyLoss(weight=torch.ones(3)), "torch.nn.modules.loss.CrossEntropyLoss"),
        "a data set": (torch.utils.data.TensorDataset(torch.ones(3)), "torch.utils.data.dataset.TensorDataset"),
    }


@pytest.mark.parametrize("what", bystanders())
def test_what_is_no_plain_data_beside_the_weights_is_left_out_and_named(what, tmp_path):
    for zipped in [True, False]:
        value, name = bystanders()[what]
        content = {"state_dict": network().state_dict(), "options": {"value": value, "lr": 0.1, "list": [1, value]}}
        found = foreign.read(save(content, tmp_path / "x.ckpt", zipped))
        assert equal(found.state_dict, OrderedDict(network().state_dict()))
        assert found.rest["options"]["lr"] == 0.1
        assert found.left_out[0].startswith("`options.value")
        assert all(entry.endswith(f"({name})") for entry in found.left_out)
        assert written_back(found, tmp_path)["options"]["list"][0] == 1  # it is plain


def test_what_is_no_plain_data_among_the_weights_is_refused_by_name(tmp_path):
    path = save({**network().state_dict(), "day": datetime.date(2026, 1, 1)}, tmp_path / "x.pt")
    assert foreign.read(path).left_out == ["`day` (datetime.date)"]  # dots in names tell weights beside other things
    with pytest.raises(bnnify.CheckpointError, match=r"no state_dict.*`datetime\.date`"):
        foreign.read(save({"w": torch.ones(2), "day": datetime.date(2026, 1, 1)}, tmp_path / "x.pt"))


def test_a_zip_file_is_mapped_not_copied(tmp_path):
    path = save({"w": torch.ones(1000), "v": torch.zeros(1000)}, tmp_path / "x.pt")
    found = foreign.read(path)
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc")
    assert str(path) in Path("/proc/self/maps").read_text()
    found.state_dict["w"].add_(1)  # a copy is made on writing
    assert torch.load(path)["w"].sum() == 1000


def test_every_protocol_of_pickle(tmp_path):
    for protocol in [2, 3, 4, 5]:
        path = tmp_path / "x.pt"
        torch.save({"state_dict": network().state_dict(), "b": b"xy", "s": {1}}, path, pickle_protocol=protocol)
        found = foreign.read(path)
        assert equal(found.state_dict, OrderedDict(network().state_dict()))
        assert (found.rest["b"], found.rest["s"]) == (b"xy", {1})


def test_checksums_may_be_missing(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = save(network().state_dict(), tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert equal(foreign.read(path).state_dict, OrderedDict(network().state_dict()))


# --- Safetensors, shards and directories ------------------------------------------------------------------------------


def test_safetensors_come_back(tmp_path):
    torch_files = pytest.importorskip("safetensors.torch")
    state = {"model." + name: value for name, value in sorted(network().state_dict().items())}
    torch_files.save_file(state, tmp_path / "x.safetensors", {"format": "pt"})
    found = foreign.read(tmp_path / "x.safetensors")
    assert (found.layout.kind, found.layout.prefix) == ("safetensors", "model.")
    model = network()
    foreign.write(tmp_path / "y.safetensors", found.layout, model.state_dict(), found.rest)
    assert (tmp_path / "y.safetensors").read_bytes() == (tmp_path / "x.safetensors").read_bytes()
    # Under a wrong name too: it is told by what it begins with.
    os.rename(tmp_path / "x.safetensors", tmp_path / "x.bin")
    assert equal(foreign.read(tmp_path / "x.bin").state_dict, found.state_dict)


def test_shared_and_strided_tensors_fit_into_safetensors(tmp_path):
    pytest.importorskip("safetensors")
    base = torch.randn(4, 4)
    state = {"a": base.t(), "b": base[1:], "c": torch.ones(1).expand(3)}
    foreign.write(tmp_path / "x.safetensors", Layout("safetensors"), state, {})
    assert equal(foreign.read(tmp_path / "x.safetensors").state_dict, OrderedDict(state))


def test_safetensors_without_the_library_name_the_way_to_it(tmp_path, monkeypatch):
    torch_files = pytest.importorskip("safetensors.torch")
    torch_files.save_file({"w": torch.ones(2)}, tmp_path / "x.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(bnnify.CheckpointError, match="pip install safetensors"):
        foreign.read(tmp_path / "x.safetensors")
    with pytest.raises(bnnify.CheckpointError, match="pip install safetensors"):
        foreign.write(tmp_path / "y.safetensors", Layout("safetensors"), {"w": torch.ones(2)}, {})


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("by", ["index", "folder", "hub cache"])
def test_shards_are_put_together(kind, by, tmp_path):
    torch_files = pytest.importorskip("safetensors.torch")
    folder = tmp_path / "models--a--b" / "snapshots" / "abc"
    blobs = tmp_path / "models--a--b" / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    state = network().state_dict()
    stem = "model" if kind == "safetensors" else "pytorch_model"
    weight_map = {}
    for number, names in enumerate((list(state)[:3], list(state)[3:])):
        file = f"{stem}-{number + 1:05}-of-00002.{kind}"
        target = blobs / f"{number}" if by == "hub cache" else folder / file
        part = {name: state[name] for name in names}
        torch_files.save_file(part, target) if kind == "safetensors" else torch.save(part, target)
        if by == "hub cache":
            (folder / file).symlink_to(Path("../../blobs") / target.name)
        weight_map |= dict.fromkeys(names, file)
    index = folder / f"{stem}.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text('{"architectures": ["Net"]}')
    found = foreign.read(index if by == "index" else folder)
    assert equal(found.state_dict, OrderedDict(state))
    assert found.config == (None if by == "index" else {"architectures": ["Net"]})


def tiny_config(**more):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return {"architectures": ["BertModel"], "model_type": "bert", "vocab_size": 11, **sizes, **more}


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({}, "has no `architectures`"),
        ({"architectures": ["os"]}, "class 'os'"),
        ({"architectures": ["AutoModel"]}, "class 'AutoModel'"),
        ({"architectures": ["BertConfig"]}, "class 'BertConfig'"),
        ({"architectures": ["Nothing"]}, "class 'Nothing'"),
        ({"architectures": 3}, "has no `architectures`"),
        (tiny_config(quantization_config={"bits": 4}), "quantized"),
        (tiny_config(num_hidden_layers=10**9), "num_hidden_layers=1000000000"),
        (tiny_config(num_hidden_layers="x"), "cannot make a BertModel"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(config, complaint):
    pytest.importorskip("transformers")
    with pytest.raises(bnnify.CheckpointError, match=complaint):
        model_from_config(config)


def test_a_config_does_not_say_which_code_is_run():
    pytest.importorskip("transformers")
    config = tiny_config(attn_implementation="evil/kernel", auto_map={"AutoModel": "evil--x.Net"})
    model_from_config(config)


# --- Whole modules and programs ---------------------------------------------------------------------------------------

MODULES = {
    "sequential": lambda: network(),
    "alone": lambda: nn.Linear(2, 3),
    "parallel": lambda: nn.DataParallel(network()),
    "recurrent": lambda: nn.LSTM(3, 4, 2, bidirectional=True),
    "transformer": lambda: nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True),
    "containers": lambda: nn.ModuleDict({"a": nn.ModuleList([nn.PReLU()]), "b": nn.ParameterList([torch.ones(2)])}),
    "resnet": lambda: torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], 3),
    "vision transformer": lambda: torchvision.models.VisionTransformer(16, 8, 1, 2, 8, 16),
    "efficientnet": lambda: torchvision.models.mobilenet_v3_small(num_classes=3),
}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_a_pickled_module_is_rebuilt(make, tmp_path):
    for zipped in [True, False]:
        module = make().eval()
        found = foreign.read(save(module, tmp_path / "x.pt", zipped))
        module = getattr(module, "module", module)
        assert str(found.module) == str(module)
        assert equal(found.state_dict, OrderedDict(module.state_dict()))
        for (name, ours), (_, theirs) in zip(module.named_modules(), found.module.named_modules(), strict=True):
            assert type(ours) is type(theirs)
            assert ours.__dict__.keys() == theirs.__dict__.keys(), name
        assert equal(written_back(found, tmp_path), OrderedDict(module.state_dict()))


def test_a_rebuilt_module_computes_what_it_did_and_converts(tmp_path):
    module = MODULES["vision transformer"]().eval()
    found = foreign.read(save({"model": module, "epoch": 3, "loss": nn.CrossEntropyLoss()}, tmp_path / "x.pt"))
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(found.module(x), module(x))
    assert (found.layout.keys, found.rest) == (("model",), {"epoch": 3})
    bnnify.convert(found.module)


def test_ties_and_frozen_parameters_of_a_module_stay(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    again = foreign.read(save(model, tmp_path / "x.pt")).module
    assert again[1].weight is again[0].weight
    assert [p.requires_grad for p in again.parameters()] == [True, False, True]


class Net(nn.Linear):
    pass


def test_a_class_of_ones_own_needs_trust(tmp_path):
    path = save({"model": Net(2, 2), "epoch": 3}, tmp_path / "x.pt")
    with pytest.raises(bnnify.CheckpointError, match=rf"`{re.escape(__name__)}\.Net`.*--trust"):
        foreign.read(path)
    found = foreign.read(path, trust=True)
    assert type(found.module) is Net
    assert found.rest == {"epoch": 3}


class Tower(nn.Module):
    """A class that nobody else has, of layers that everybody has, with all that a module may register."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 2), Net(2, 2))
        self.head = nn.Linear(2, 2)
        self.head.weight = self.layers[0].weight
        self.scale = nn.Parameter(torch.ones(2))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("unsaved", torch.zeros(2), persistent=False)
        self.register_parameter("nothing", None)
        self.hook = self.register_forward_hook(hook)


def hook(*_):
    raise AssertionError("it ran")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("keys", [(), ("odd",)])
def test_of_a_module_of_anybodys_class_the_tensors_are_read_where_the_model_is_known(keys, zipped, tmp_path):
    wanted = Tower().state_dict()
    content = {"epoch": 3, keys[0]: nn.DataParallel(Tower())} if keys else Tower()
    found = foreign.read(save(content, tmp_path / "x.pt", zipped), names=wanted)
    assert found.state_dict.keys() == wanted.keys()
    assert torch.equal(found.state_dict["scale"], wanted["scale"])
    assert found.module is None
    assert (found.layout.keys, found.layout.prefix) == (keys, "module." if keys else "")
    assert written_back(found, tmp_path).keys() == (content.keys() if keys else wanted.keys())


def test_a_state_dict_beside_a_module_of_ones_own_is_found(tmp_path):
    path = save({"model": Tower(), "weights": network().state_dict()}, tmp_path / "x.pt")
    found = foreign.read(path)
    assert found.layout.keys == ("weights",)
    assert found.left_out == [f"`model` ({__name__}.Tower)"]


@pytest.mark.parametrize("name", ["vdsr_epoch50.pth", "chemprop_v2_reg.ckpt", "allennlp_tagger.th", "mtcnn_onet.pt"])
def test_published_files_give_their_tensors(name, data_folder):
    found = foreign.read(data_folder / "published" / name, names=())
    wanted = {"vdsr_epoch50.pth": 20, "chemprop_v2_reg.ckpt": 16, "allennlp_tagger.th": 9, "mtcnn_onet.pt": 21}[name]
    assert len(found.state_dict) == wanted
    assert not foreign.not_finite(found.state_dict)
    assert bool(found.left_out) == (name == "chemprop_v2_reg.ckpt")


def test_a_classifier_of_another_library_is_refused_by_name(data_folder, tmp_path):
    with pytest.raises(bnnify.CheckpointError, match=r"`sklearn\.svm\._classes\.SVC`"):
        foreign.read(data_folder / "published" / "dtu_model.ckpt")
    (tmp_path / "x.pt").write_bytes(pickle.dumps(decimal.Decimal(1), 2))
    with pytest.raises(bnnify.CheckpointError, match=r"`decimal\.Decimal`"):
        foreign.read(tmp_path / "x.pt")


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_exported_program_becomes_a_module(dynamic, tmp_path):
    model, x = network().eval(), torch.randn(2, 1, 4, 4)
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},) if dynamic else None
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=shapes), tmp_path / "x.pt2")
    found = foreign.read(tmp_path / "x.pt2")
    assert torch.equal(found.module(x), model(x))
    assert equal(OrderedDict(found.state_dict), OrderedDict(model.state_dict()))
    bnnify.convert(found.module)


def with_program(path, change, more=()):
    """A copy of an exported program in which ``change`` has edited the JSON."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(path.with_name("y.pt2"), "w") as target:
        for entry in source.namelist():
            content = source.read(entry)
            if entry.endswith("models/model.json"):
                content = change(content.decode()).encode()
            target.writestr(entry, dict(more).get(entry.partition("/")[2], content))
    return path.with_name("y.pt2")


def test_an_exported_program_runs_nothing_while_it_is_read(tmp_path):
    model, x = network().eval(), torch.randn(2, 1, 4, 4)
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    path = tmp_path / "x.pt2"
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=shapes), path)
    evil = f"open('{tmp_path}/canary', 'w')"
    symbol = r"Symbol\('s\d+', positive=True, integer=True\)"
    changes = {
        "the size `open": lambda text: re.sub(symbol, evil, text),
        r"the size `9\*\*9": lambda text: re.sub(symbol, "9**9**9**9", text),
        r"the operator `torch\.os\.system`": lambda text: text.replace(
            "torch.ops.aten.linear.default", "torch.os.system"
        ),
        r"the operator `torch\.ops\.aten\.from_file": lambda text: text.replace(
            "aten.linear.default", "aten.from_file.default"
        ),
        r"the name `p_3_bias, x=open\(\)`": lambda text: text.replace('"p_3_bias"', '"p_3_bias, x=open()"'),
        r"the type `collections\.defaultdict`": lambda text: text.replace("builtins.dict", "collections.defaultdict"),
        "JSONDecodeError": lambda text: text[:-5],
    }
    for what, change in changes.items():
        with pytest.raises(bnnify.CheckpointError, match=what):
            foreign.read(with_program(path, change))
    config = json.dumps({"config": {"x": {"path_name": "opaque_obj_0", "use_pickle": True, "tensor_meta": None}}})
    with pytest.raises(bnnify.CheckpointError, match="opaque_obj_0"):
        foreign.read(with_program(path, str, {"data/constants/model_constants_config.json": config}))
    # What is only left out may say what it likes.
    guards = with_program(path, lambda text: text.replace('"guards_code": [', f'"guards_code": ["{evil}", '))
    samples = with_program(path, str, {"data/sample_inputs/model.pt": b"cos\nsystem\n(S'x'\ntR."})
    for changed in (guards, samples):
        assert torch.equal(foreign.read(changed).module(x), model(x))
    assert not (tmp_path / "canary").exists()
    assert not logging.root.manager.disable


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("x.onnx", b"\x08\x07\x12\x07pytorch", "ONNX"),
        ("x.pb", b"\x08\x07", "TensorFlow"),
        ("x.gguf", b"GGUF\3\0\0\0", "GGUF"),
        ("x.h5", b"\x89HDF\r\n\x1a\n", "HDF5"),
        ("x.npy", b"\x93NUMPY\1\0", "NumPy"),
        ("x.pt", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("x.pt", b"\n<!DOCTYPE html>", "web page"),
        ("x.pt", b"hello", "neither a file of torch.save nor safetensors"),
    ],
)
def test_files_of_other_kinds_are_told_apart(name, content, complaint, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(bnnify.CheckpointError, match=complaint):
        foreign.read(tmp_path / name)


def test_torchscript_and_quantized_files_are_refused_with_the_way_out(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(network().eval(), torch.randn(1, 1, 4, 4)), tmp_path / "x.pt")
        quantized = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
        save({"w": quantized}, tmp_path / "q.pt")
        save({"w": quantized}, tmp_path / "old.pt", zipped=False)
    with pytest.raises(bnnify.CheckpointError, match=r"TorchScript.*state_dict"):
        foreign.read(tmp_path / "x.pt")
    for name in ("q.pt", "old.pt"):
        with pytest.raises(bnnify.CheckpointError, match=r"quantized.*collapse"):
            foreign.read(tmp_path / name)


# --- Writing ----------------------------------------------------------------------------------------------------------


def test_an_interrupted_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(b"precious")
    for interruption in (KeyboardInterrupt, SystemExit, ValueError):
        with pytest.raises(interruption):
            with replace_atomically(path) as file:
                file.write(b"half")
                raise interruption
    assert path.read_bytes() == b"precious"
    assert os.listdir(tmp_path) == ["x.pt"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX limits")
@pytest.mark.parametrize("kind", ["torch", "torch-legacy", "safetensors"])
def test_a_full_disk_leaves_nothing_half_written(kind, tmp_path):
    if kind == "safetensors":
        pytest.importorskip("safetensors")
    (tmp_path / "x.pt").write_bytes(b"precious")
    script = f"""
import resource, signal, torch, bnnify
from bnnify.checkpoints.foreign import read_write as foreign
from bnnify.checkpoints.foreign.layout import Layout
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for name in ("x.pt", "new.pt"):
    try:
        foreign.write(name, Layout({kind!r}), {{"w": torch.ones(10**6)}}, {{}})
    except bnnify.CheckpointError as error:
        print(error)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    for name, line in zip(("x.pt", "new.pt"), lines, strict=True):
        assert f"Cannot write `{name}`" in line
        assert "File too large" in line
    assert done.stderr == ""
    assert os.listdir(tmp_path) == ["x.pt"]
    assert (tmp_path / "x.pt").read_bytes() == b"precious"


@pytest.mark.parametrize("where", ["missing/x.pt", "folder", "file/x.pt", "pipe", "x" * 300])
def test_what_cannot_be_written_is_said(where, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(bnnify.CheckpointError, match="Cannot write"):
        foreign.write(tmp_path / where, Layout("torch"), {"w": torch.ones(2)}, {})
    assert sorted(os.listdir(tmp_path)) == before


def test_a_new_file_has_ordinary_permissions_and_a_link_stays(tmp_path):
    (tmp_path / "link.pt").symlink_to("x.pt")
    mask = os.umask(0o027)
    try:
        foreign.write(tmp_path / "link.pt", Layout("torch"), {"w": torch.ones(2)}, {})
    finally:
        os.umask(mask)
    assert (tmp_path / "x.pt").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "link.pt").is_symlink()
    assert not (tmp_path / "x.pt").is_symlink()


def test_a_layout_is_plain_data(tmp_path):
    layout = Layout("torch-legacy", ("a", "b.c"), "module.", ("w", "v"))
    data = layout.as_data()
    assert Layout.from_data(json.loads(json.dumps(data))) == layout
    torch.save(data, tmp_path / "x.pt")
    assert Layout.from_data(torch.load(tmp_path / "x.pt", weights_only=True)) == layout
    for broken in (
        {},
        {**data, "kind": "zip"},
        {**data, "keys": "a"},
        {**data, "names": [3]},
        {**data, "prefix": None},
    ):
        with pytest.raises(bnnify.CheckpointError, match="layout is damaged"):
            Layout.from_data(broken)


# --- Real files -------------------------------------------------------------------------------------------------------

REAL = {
    "resnet20-12fca82f.th": (("state_dict",), "module.", 97, ["best_prec1"]),
    "cgcnn_band-gap.pth.tar": (("state_dict",), "", 46, ["epoch", "best_mae_error", "optimizer", "normalizer", "args"]),
    "khushbujpatel_lenet5_mnist.pt": ((), "", 10, []),
    "convadv_mnist.pth": ((), "", 8, []),
    "lpips_squeeze.pth": ((), "", 7, []),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files_come_back_bit_for_bit(name, data_folder, tmp_path):
    path = data_folder / "checkpoints" / name
    keys, prefix, count, rest = REAL[name]
    found = foreign.read(path)
    assert (found.layout.kind, found.layout.keys, found.layout.prefix) == ("torch-legacy", keys, prefix)
    assert len(found.state_dict) == count
    assert [key for key in found.rest if key not in keys] == rest
    assert not foreign.not_finite(found.state_dict)
    state = copy.deepcopy(found.state_dict)
    if prefix:  # as a model of today gives it back
        state["bn1.num_batches_tracked"] = torch.tensor(0)
    original = torch.load(path, map_location="cpu", weights_only=True)
    assert equal(written_back(found, tmp_path, state), original)
