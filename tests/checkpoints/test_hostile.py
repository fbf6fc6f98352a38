"""Checkpoints made to do harm, and broken ones: each ends in one line, soon, in little memory, and nothing runs."""

import io
import json
import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
import torchvision.models  # noqa: F401, which would count as time that the first module takes
from torch import nn

import bnnify
from bnnify.checkpoints.foreign import read_write as foreign
from bnnify.checkpoints.foreign import unpickler as pickled
from bnnify.cli.command import main

MAGIC = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
CANARY = "canary"
TOUCH = f"open({CANARY!r}, 'w').close()"
SHELL = f"touch {CANARY}"


# --- Pickles, written by hand -----------------------------------------------------------------------------------------


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def put(value):
    """A value that pickle itself writes, without its frame."""
    return pickle.dumps(value, 2)[2:-1]


def name(dotted):
    module, _, attribute = dotted.rpartition(".")
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def call(dotted, *arguments):
    """The result of calling what ``dotted`` names; bytes among the arguments are pickled already."""
    return name(dotted) + b"(" + b"".join(a if isinstance(a, bytes) else put(a) for a in arguments) + b"tR"


def mapping(**items):
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def storage(key="0", numel=4, kind="torch.FloatStorage", location="cpu"):
    return b"(" + text("storage") + name(kind) + text(key) + text(location) + put(numel) + b"tQ"


def legacy_storage(key="0", numel=4, view=None):
    return storage(key, numel)[:-2] + put(view) + b"tQ"


def tensor(memory=None, offset=0, size=(2, 2), stride=(2, 1)):
    hooks = call("collections.OrderedDict")
    memory = storage() if memory is None else memory
    return call("torch._utils._rebuild_tensor_v2", memory, offset, size, stride, False, hooks)


def module(dotted="torch.nn.modules.linear.Linear", **state):
    usual = {"training": put(True), "_parameters": put({}), "_buffers": put({}), "_modules": put({})}
    return name(dotted) + b")\x81" + mapping(**{**usual, **state}) + b"b"


def zipped(body, data=b"\0" * 16, protocol=2, **more):
    entries = {"data.pkl": bytes([0x80, protocol]) + body + b".", "data/0": data, "version": b"3\n", **more}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for key, content in entries.items():
            archive.writestr(f"archive/{key}", content)
    return file.getvalue()


FOUR_ZEROS = struct.pack("<q", 4) + b"\0" * 16


def legacy(body, keys=("0",), data=FOUR_ZEROS):
    header = b"".join(pickle.dumps(value, 2) for value in MAGIC)
    return header + b"\x80\x02" + body + b"." + pickle.dumps(keys if isinstance(keys, dict) else list(keys), 2) + data


def safetensors(header, data=b"", length=None):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + data


def saved(content, zipped=True):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


# --- Cases: what to write, under which name ---------------------------------------------------------------------------

GADGETS = {
    "os.system": (SHELL,),
    "builtins.eval": (TOUCH,),
    "builtins.getattr": (name("torch.Tensor"), "__init__"),
    "operator.attrgetter": ("__class__",),
    "copyreg._reconstructor": (name("torch.Tensor"), name("builtins.set"), None),
    "pickle.loads": (b"C\x01.",),
    "numpy.core.multiarray._reconstruct": (),
    "torch.jit._script.unpackage_script_module": (),
    "torch.storage._load_from_bytes": (b"C\x01.",),
    "torch.fx.graph_module.reduce_graph_module": ({"_code": TOUCH}, ""),
    "sys.exit": (3,),
    "models.net.Net": (),
    "..os.system": (SHELL,),
    "os\x1b[2J.system": (SHELL,),
}


def code_cases():
    for gadget, arguments in GADGETS.items():
        yield gadget, zipped(mapping(w=tensor(), x=call(gadget, *arguments)))
    gadget, arguments = name("os.system"), put((SHELL,))
    run = call("os.system", SHELL)
    by_name = b"\x8c\x02os\x8c\x06system\x93"
    rebuilt = call("torch._tensor._rebuild_from_type_v2", gadget, name("torch.Tensor"), (SHELL,), None)
    hooked = call("torch._utils._rebuild_tensor_v2", storage(), 0, (2,), (1,), True, run)
    yield "a call in an old file", legacy(mapping(w=tensor(legacy_storage()), x=run))
    yield "a call by STACK_GLOBAL", zipped(by_name + arguments + b"R", protocol=4)
    yield "a call by NEWOBJ", zipped(gadget + arguments + b"\x81")
    yield "a call by NEWOBJ_EX", zipped(gadget + arguments + b"}\x92", protocol=4)
    yield "a call by OBJ", zipped(b"(" + gadget + text(SHELL) + b"o")
    yield "a call by INST", zipped(b"(" + text(SHELL) + b"ios\nsystem\n")
    yield "a call by EXT1", zipped(b"\x82\x01" + arguments + b"R")
    yield "a call in a header", pickle.dumps(MAGIC[0], 2) + b"\x80\x02" + run + b"."
    yield "a call as the first value", b"\x80\x02" + run + b"."
    yield "a call after the pickle", legacy(put({"w": 1})) + b"\x80\x02" + run + b"."
    keys = pickle.dumps(["0"], 2)
    yield "a call among the keys", legacy(mapping(w=tensor(legacy_storage()))).replace(keys, b"\x80\x02" + run + b".")
    yield "a call as a persistent id", zipped(b"(" + text("storage") + run + b"tQ")
    yield "a class with source", legacy(b"(" + text("module") + gadget + text("f") + text("s") + b"tQ")
    yield "a call as a hook of a tensor", zipped(mapping(w=hooked))
    yield "a call as rebuild function", zipped(mapping(w=rebuilt))
    yield "a default factory", zipped(mapping(d=call("collections.defaultdict", gadget), w=tensor()))
    yield "a call in a module", zipped(module(x=run))
    yield "a forward hook", zipped(module(_forward_hooks=b"}" + put(0) + gadget + b"s"))
    yield "a partial in a module", zipped(module(x=name("functools.partial") + b"(" + gadget + b"tR"))
    yield "a path of names", zipped(b"\x8c\x05torch\x8c\x09os.system\x93" + arguments + b"R", protocol=4)


def module_cases():
    """Modules of allowed classes, in a state that no training leaves."""
    relu = name("torch.nn.functional.relu")
    linear = "torch.nn.modules.linear.Linear"
    yield "a constructor call", zipped(call(linear, 10**6, 10**6))
    yield "a constructor call by NEWOBJ", zipped(name(linear) + put((10**6, 10**6)) + b"\x81")
    yield "a forward of its own", zipped(module(forward=relu))
    yield "a state_dict of its own", zipped(module(state_dict=relu))
    yield "a __class__ of its own", zipped(module(__class__=relu))
    yield "a compiled call", zipped(module(_compiled_call_impl=relu))
    for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks"):
        yield f"an allowed function in {kind}", zipped(module(**{kind: b"}" + put(0) + relu + b"s"}))
    yield "hooks that are no dict", zipped(module(_forward_hooks=put(0)))
    yield "parameters that are no dict", zipped(module(_parameters=put([1])))
    yield "a parameter that is a number", zipped(module(_parameters=put({"weight": 3})))
    yield "a parameter with a dotted name", zipped(module(_parameters=put({"a.b": None})))
    yield "a submodule that is a function", zipped(module(_modules=b"}" + text("x") + relu + b"s"))
    yield "no state", zipped(name(linear) + b")\x81")
    yield "a state that is no dict", zipped(name(linear) + b")\x81" + put([1]) + b"b")
    yield "no registries", zipped(name(linear) + b")\x81" + put({"x": 1}) + b"b")
    yield "a function where a class should be", zipped(name("torch.nn.functional.relu") + b")\x81}b")
    yield "a class that is gone", zipped(module("torch.nn.modules.linear.Gone"))
    yield "a helper of the library", zipped(module("torch.nn.modules.module.OrderedDict"))
    yield "a module of the library", zipped(module("torch.nn.modules.module.sys"))
    yield "a function of the library", zipped(module("torch.nn.modules.module.register_module_forward_hook"))
    yield "a builder of torchvision", zipped(call("torchvision.models.resnet.resnet152"))
    yield "a downloader of torchvision", zipped(call("torchvision.models._api.get_model", "resnet18"))
    yield "a module that is not imported", zipped(module("torchvision.models.nowhere.Net"))
    yield (
        "a module in itself",
        zipped(
            name(linear) + b")\x81q\x01" + mapping(_modules=b"}" + text("x") + b"h\x01s", _parameters=put({})) + b"b"
        ),
    )
    twice = module()
    for level in range(40):
        twice = module(
            _modules=b"}(" + text("a") + twice + b"q" + bytes([level]) + text("b") + b"h" + bytes([level]) + b"u"
        )
    yield "a module with 2**40 names", zipped(twice)
    deep = module()
    for _ in range(2000):
        deep = module(_modules=b"}" + text("a") + deep + b"s")
    yield "2000 modules in each other", zipped(deep)
    yield (
        "a recurrent layer of 10**12 layers",
        zipped(
            module(
                "torch.nn.modules.rnn.LSTM", num_layers=put(10**12), _all_weights=put([[1]]), bidirectional=put(False)
            )
        ),
    )
    yield "a partial of nothing", zipped(module(x=name("functools.partial") + b")R"))
    yield "two modules and no usual key", zipped(mapping(generator=module(), critic=module()))


def memory_cases():
    """A few bytes that ask for much."""
    huge = 10**11
    yield "bytearray of 10**11", zipped(mapping(x=call("builtins.bytearray", huge)))
    yield "tensor of 10**11", zipped(mapping(x=call("torch.Tensor", huge)))
    yield "a storage of 10**11 in an old file", legacy(mapping(w=tensor(legacy_storage(numel=huge))))
    yield (
        "many storages in an old file",
        legacy(mapping(**{f"w{i}": tensor(legacy_storage(str(i), 1000)) for i in range(100)}), map(str, range(100))),
    )
    yield "a storage longer than its record", zipped(mapping(w=tensor(storage(numel=huge))))
    yield "a tensor longer than its storage", zipped(mapping(w=tensor(size=(huge,), stride=(1,))))
    yield "an expanded tensor", zipped(mapping(w=tensor(size=(huge,), stride=(0,))))
    yield "an expanded tensor in an old file", legacy(mapping(w=tensor(legacy_storage(), 0, (huge,), (0,))))
    yield (
        "many expanded tensors",
        zipped(mapping(**{f"w{i}": tensor(size=(10**7, i + 1), stride=(0, 0)) for i in range(50)})),
    )
    yield "an offset beyond the end", zipped(mapping(w=tensor(offset=1)))
    yield "a negative offset", zipped(mapping(w=tensor(offset=-1)))
    yield "a negative size", zipped(mapping(w=tensor(size=(-1, 2))))
    yield "a negative stride", zipped(mapping(w=tensor(stride=(-2, 1))))
    yield "a size that overflows", zipped(mapping(w=tensor(size=(2**40, 2**40), stride=(0, 0))))
    yield "10,000 dimensions", zipped(mapping(w=tensor(size=(1,) * 10**4, stride=(1,) * 10**4)))
    yield "fewer strides than sizes", zipped(mapping(w=tensor(stride=(1,))))
    yield "a view beyond its storage", legacy(mapping(w=tensor(legacy_storage(view=("1", 0, huge)))))
    yield (
        "a tuple of 2**60 leaves as a key",
        zipped(
            b"}" + b"K\x01" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60)) + b"K\x01s"
        ),
    )
    yield "a tuple of depth 30,000 as a key", zipped(b"}K\x01" + b"\x85" * 30_000 + b"K\x01s")
    yield "a set of deep tuples", zipped(call("builtins.set", b"]K\x01" + b"\x85" * 30_000 + b"a"))
    yield "lists of depth 30,000", zipped(mapping(x=b"]" * 30_000 + b"a" * 29_999))
    yield "dicts of depth 10**4", zipped((b"}" + text("a")) * 10**4 + b"}" + b"s" * 10**4)
    shared = b"]q\x00" + b"".join(b"]q" + bytes([i]) + b"(" + (b"h" + bytes([i - 1])) * 2 + b"e" for i in range(1, 60))
    yield "lists of 2**60 leaves", zipped(mapping(x=shared))
    level = b"}q\x00"
    for i in range(1, 7):
        level = b"}(" + text("k0") + level + b"".join(text(f"k{j}") + b"h" + bytes([i - 1]) for j in range(1, 100))
        level += b"uq" + bytes([i])
    yield "mappings with 100**6 paths", zipped(level)
    yield (
        "integers that collide",
        zipped(b"}(" + b"".join(put(i * (2**61 - 1)) + b"N" for i in range(1, 20_000)) + b"u"),
    )
    yield "a memo at 2**32 - 1", zipped(put({"w": 1}) + b"r\xff\xff\xff\xff")
    yield "a text of 4 GB", zipped(b"X\xff\xff\xff\xffabc")
    yield "bytes of 2**62", zipped(b"\x8e" + struct.pack("<Q", 2**62) + b"abc", protocol=4)
    yield "an integer of a million digits", zipped(b"L" + b"9" * 10**6 + b"L\n")
    yield "a frame of 2**62", zipped(b"\x95" + struct.pack("<Q", 2**62), protocol=4)
    yield "a prefix of a million wrappers", zipped(mapping(**{"module." * 10**5 + "w": put(1)}))


def archive_cases():
    good = zipped(mapping(w=tensor()))

    def rewritten(compression=zipfile.ZIP_DEFLATED, extra=()):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", compression) as target, zipfile.ZipFile(io.BytesIO(good)) as source:
            for entry in source.namelist():
                target.writestr(entry, source.read(entry))
            for entry, content in extra:
                target.writestr(entry, content)
        return file.getvalue()

    yield "compressed entries", rewritten()
    yield "a bomb of zeros", rewritten(extra=[("archive/data/1", b"\0" * 10**7)])
    yield "entries compressed with bzip2", rewritten(zipfile.ZIP_BZIP2)
    yield "entries compressed with lzma", rewritten(zipfile.ZIP_LZMA)
    stored = zipfile.ZIP_STORED
    yield "an entry twice", rewritten(stored, [("archive/data.pkl", b"\x80\x02}.")])
    yield "an entry outside", rewritten(stored, [("../../evil", b"x")])
    yield "an absolute entry", rewritten(stored, [("/etc/evil", b"x")])
    yield "two folders", rewritten(stored, [("other/data.pkl", b"x")])
    yield "a TorchScript archive", rewritten(stored, [("archive/constants.pkl", b"x")])
    yield "code of TorchScript", rewritten(stored, [("archive/code/x.py", b"x")])
    yield "a big-endian file", zipped(mapping(w=tensor()), byteorder=b"big")
    yield "an unknown byte order", zipped(mapping(w=tensor()), byteorder=b"x")
    yield "a missing record", zipped(mapping(w=tensor(storage("1"))))
    yield "a record elsewhere", zipped(mapping(w=tensor(storage("../data.pkl"))))
    yield "a data.pkl that is missing", good.replace(b"data.pkl", b"data.pk_")
    yield "a zip of something else", zipped(b"N").replace(b"archive/data.pkl", b"archive/x-ta.pkl")
    yield "an empty zip", b"PK\x05\x06" + b"\0" * 18
    yield "a NumPy archive", rewritten(stored).replace(b"archive/", b"w.npy___")
    two = bytearray(zipped(mapping(w=tensor(), v=tensor(storage("1"))), **{"data/1": b"\0" * 16}))
    first, second = two.rindex(b"archive/data/0"), two.rindex(b"archive/data/1")
    two[second - 4 : second] = two[first - 4 : first]  # where the entry stands is just before its name
    yield "two entries for one record", bytes(two)
    start = good.rindex(b"PK\x05\x06")
    for field, value in ((12, 2**32 - 1), (12, 10**6), (16, 2**32 - 2), (16, 0), (12, 0)):
        broken = bytearray(good)
        broken[start + field : start + field + 4] = value.to_bytes(4, "little")
        yield f"an end record with {value} at {field}", bytes(broken)
    entry = good.index(b"PK\x01\x02")
    changes = [(20, 10**9), (24, 10**9), (24, 2**32 - 1), (42, 2**31), (42, 7), (28, 60000), (10, 99), (8, 1)]
    for field, value in changes:
        size = 2 if field < 20 or field == 28 else 4
        broken = bytearray(good)
        broken[entry + field : entry + field + size] = value.to_bytes(size, "little")
        yield f"a directory entry with {value} at {field}", bytes(broken)


def safetensors_cases():
    def one(dtype="F32", shape=(2,), offsets=(0, 8)):
        return {"w": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}

    data = b"\0" * 8
    yield "a header of 2**63", safetensors(one(), data, 2**63)
    yield "a header of 200 MB", safetensors(one(), data, 2 * 10**8)
    yield "a header longer than the file", safetensors(one(), data, 1000)
    yield "a header that is cut off", safetensors(one(), data, 20)
    yield "a header of no bytes", safetensors(b"", data)
    yield "a header that is no JSON", safetensors(b"{x", data)
    yield "a header that is a list", safetensors(b"{}"[:0] + b"[]      ", data)
    yield "a header of depth 10**5", safetensors(b'{"w":' + b"[" * 10**5, data)
    yield "a header without tensors", safetensors({}, b"")
    yield (
        "a name twice",
        safetensors(
            b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
            data,
        ),
    )
    yield "an unknown dtype", safetensors(one("F31"), data)
    yield "a wrong dtype", safetensors(one("F64"), data)
    yield "a wrong shape", safetensors(one(shape=(3,)), data)
    yield "a shape that overflows", safetensors(one(shape=(2**40, 2**40)), data)
    yield "a negative shape", safetensors(one(shape=(-2,)), data)
    yield "offsets beyond the end", safetensors(one(shape=(4,), offsets=(0, 16)), data)
    yield "offsets backwards", safetensors(one(offsets=(8, 0)), data)
    yield "offsets with a hole", safetensors(one(shape=(1,), offsets=(4, 8)), data)
    yield "overlapping tensors", safetensors({**one(), "v": one()["w"]}, data)
    yield "data after the end", safetensors(one(), data + b"\0")
    yield "a tensor that is a text", safetensors({"w": "x"}, data)


def other_cases():
    yield "nothing", b""
    yield "a byte", b"\x80"
    yield "zeros", b"\0" * 1000
    yield "noise", random.Random(0).randbytes(10_000)
    yield "text", b"hello\n"
    yield "a Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"
    yield "a web page", b"<!DOCTYPE html>\n<html>"
    yield "GGUF", b"GGUF" + b"\0" * 100
    yield "HDF5", b"\x89HDF\r\n\x1a\n" + b"\0" * 100
    yield "a NumPy file", b"\x93NUMPY" + b"\0" * 100
    yield "gzip", b"\x1f\x8b" + b"\0" * 100
    yield "a tar", b"storages" + b"\0" * 249 + b"ustar" + b"\0" * 250
    yield "a plain pickle", pickle.dumps({"w": [1.0]}, 2)
    yield "a plain pickle of tensors", pickle.dumps(nn.Linear(2, 2).state_dict(), 2)
    yield "a wrong protocol", pickle.dumps(MAGIC[0], 2) + pickle.dumps(1002, 2)
    one = torch.ones(2)
    for wrong in (None, 3, "x", [], {}, [one], {"epoch": 3}, {3: one}, {"a": {"b": [1]}}, one):
        yield f"{type(wrong).__name__} {str(wrong)[:20]!r} in place of weights", saved(wrong)
    yield "a sparse tensor", saved({"w": torch.eye(3).to_sparse()})
    yield "a compressed sparse tensor", saved({"w": torch.eye(3).to_sparse_csr()})
    yield "meta tensors", saved({"w": torch.empty(3, device="meta")})
    yield "a conjugated tensor", saved({"w": torch.ones(2, dtype=torch.complex64).conj()})
    yield "two state_dicts", saved({"a": {"w": torch.ones(2)}, "b": {"w": torch.ones(2)}})
    yield "an unexpected operation", zipped(b"0" * 3)
    yield "an unknown operation", zipped(b"\xff")
    yield "a mark too many", zipped(b"((((t")
    yield "a key without a value", zipped(b"}(" + text("a") + b"u")
    yield "no end", zipped(b"}")[:-1] + b"}"
    yield "a list as a key", zipped(b"}]Ns")
    yield "items set on a list", zipped(b"]" + text("a") + b"Ns")
    yield "an append to a dict", zipped(b"}Na")
    yield "a state for a list", zipped(b"]}b")
    yield "a call of a text", zipped(text("os.system") + b")R")
    yield "no tuple of arguments", zipped(name("collections.OrderedDict") + b"]R")
    yield "storage of an unknown kind", zipped(mapping(w=tensor(storage(kind="torch.EvilStorage"))))
    yield "storage without a key", zipped(mapping(w=tensor(b"(" + text("storage") + b"tQ")))
    yield (
        "storage with a list as a key",
        zipped(
            mapping(w=tensor(b"(" + text("storage") + name("torch.FloatStorage") + b"]" + text("cpu") + b"K\x04tQ"))
        ),
    )
    yield "a tensor of a text", zipped(mapping(w=tensor(text("x"))))
    yield (
        "a dtype that is a text",
        zipped(mapping(w=call("torch._utils._rebuild_tensor_v3", storage(), 0, (1,), (1,), False, {}, "float32"))),
    )
    yield "keys that are no list", legacy(mapping(w=tensor(legacy_storage())), keys={"0": 1})
    yield "keys of other storages", legacy(mapping(w=tensor(legacy_storage())), keys=("7",))
    yield (
        "another count than announced",
        legacy(mapping(w=tensor(legacy_storage())), data=struct.pack("<q", 3) + b"\0" * 16),
    )
    yield "a negative count", legacy(mapping(w=tensor(legacy_storage())), data=struct.pack("<q", -1) + b"\0" * 16)


def truncated_cases():
    state = network().state_dict()
    whole = {"zip": saved(state), "old": saved(state, zipped=False)}
    try:
        from safetensors.torch import save
    except ImportError:
        pass
    else:
        whole["safetensors"] = save(dict(state))
    for kind, content in whole.items():
        for part in range(1, 20, 3):
            yield f"{kind} cut off at {part}/20", content[: len(content) * part // 20]
        yield f"{kind} cut off by a byte", content[:-1]


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # at names that are there twice, and sparse tensors
    KINDS = (code_cases, module_cases, memory_cases, archive_cases, other_cases, truncated_cases)
    OF_EACH_KIND = [dict(cases()) for cases in KINDS]
CASES = [case for kind in OF_EACH_KIND for case in kind.items()]
SAFETENSORS_CASES = list(safetensors_cases())


def peak_memory():
    """The most memory that this process ever had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def refused(path, **options):
    """Read ``path``, which must end in one line that names it, soon and in little memory."""
    before = peak_memory()
    start = time.perf_counter()
    with pytest.raises(bnnify.CheckpointError) as caught:
        foreign.read(path, **options)
    assert time.perf_counter() - start < 20
    assert peak_memory() - before < 300
    message = str(caught.value)
    assert message.isprintable()
    assert str(path) in message
    assert len(message) < 1000
    return message


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path, monkeypatch, recwarn, capfd):
    monkeypatch.chdir(tmp_path)
    yield
    assert not os.path.exists(CANARY)
    assert not recwarn.list
    assert capfd.readouterr() == ("", "")


def test_there_are_many_cases():
    assert len({name for name, _ in CASES + SAFETENSORS_CASES}) == len(CASES + SAFETENSORS_CASES) > 200


@pytest.mark.parametrize("content", [content for _, content in CASES], ids=[name for name, _ in CASES])
def test_it_is_refused(content, tmp_path):
    Path("x.pt").write_bytes(content)
    refused(tmp_path / "x.pt")
    assert os.listdir() == ["x.pt"]


@pytest.mark.parametrize("content", [next(iter(kind.values())) for kind in OF_EACH_KIND])
def test_the_command_refuses_it_in_one_line_and_writes_nothing(content, tmp_path, capfd):
    path = tmp_path / "hostile.pt"
    path.write_bytes(content)
    assert main(["convert", str(path)]) == 1
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("bnnify-cli: ")
    assert [file.name for file in tmp_path.iterdir()] == ["hostile.pt"]


@pytest.mark.parametrize("content", [c for _, c in SAFETENSORS_CASES], ids=[name for name, _ in SAFETENSORS_CASES])
def test_safetensors_are_refused(content, tmp_path):
    pytest.importorskip("safetensors")
    Path("x.safetensors").write_bytes(content)
    refused(tmp_path / "x.safetensors")


@pytest.mark.parametrize("gadget", ["os.system", "builtins.eval"])
def test_the_canary_dies_where_code_does_run(gadget):
    """Otherwise the tests above prove nothing."""
    Path("x.pt").write_bytes(zipped(mapping(model=mapping(w=tensor()), x=call(gadget, *GADGETS[gadget]))))
    foreign.read("x.pt", trust=True)
    deadline = time.time() + 10
    while not os.path.exists(CANARY) and time.time() < deadline:
        time.sleep(0.01)
    os.unlink(CANARY)


BESIDE = {
    **{gadget: call(gadget, *GADGETS[gadget]) for gadget in ("os.system", "builtins.eval")},
    "a class": name("os.system"),
    "a state": name("models.net.Net") + b")\x81" + call("os.system", SHELL) + b"b",
    "a call of what was called": call("os.system", SHELL) + b"(" + put(SHELL) + b"tR",
    "items of what was called": call("os.system", SHELL) + b"(" + put("a") + put(1) + b"u",
    "a key": b"}" + call("os.system", SHELL) + put(1) + b"s",
    "tuples of 2**60 leaves": put(1) + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60)),
    "a module in itself": name("models.Net")
    + b")\x81q\x01"
    + mapping(_modules=b"}" + text("x") + b"h\x01s", _parameters=put({}), _buffers=put({}))
    + b"b",
}


@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE)
def test_what_stands_beside_the_weights_runs_as_little(beside):
    """Whether it is left out or the file refused: nothing runs, soon."""
    weights = b"}(" + text("w.x") + tensor() + b"u"
    Path("x.pt").write_bytes(zipped(mapping(state_dict=weights, options=mapping(value=beside))))
    start = time.perf_counter()
    for names in (None, ["w.x"]):
        try:
            found = foreign.read("x.pt", names=names)
        except bnnify.CheckpointError:
            continue
        foreign.write("y.pt", found.layout, found.state_dict, found.rest)
        assert torch.load("y.pt").keys() == {"state_dict", "options"}
    assert time.perf_counter() - start < 5
    assert not os.path.exists(CANARY)


def test_small_objects_are_counted(tmp_path, monkeypatch):
    """An empty set takes one byte in the file and 216 in memory."""
    monkeypatch.setattr(pickled, "_MAX_OPERATIONS", 1000)
    (tmp_path / "x.pt").write_bytes(zipped(b"](" + b"\x8f" * 1000 + b"e"))
    assert "millions of small objects" in refused(tmp_path / "x.pt")


def test_what_is_refused_is_named_with_the_way_out(tmp_path):
    Path("x.pt").write_bytes(zipped(call("posix.system", SHELL)))
    assert "`posix.system`" in refused(tmp_path / "x.pt")
    assert "--trust" in refused(tmp_path / "x.pt")
    Path("x.pt").write_bytes(zipped(module(x=call("models.net.Net"))))
    assert "`models.net.Net`" in refused(tmp_path / "x.pt")


@pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
def test_a_flipped_bit_is_noticed_or_does_no_harm(kind):
    """Only zip files have checksums; there a flip that is not noticed was of no account."""
    state = network().state_dict()
    if kind == "safetensors":
        content = pytest.importorskip("safetensors.torch").save(dict(state))
    else:
        content = saved(state, zipped=kind == "zip")
    chance = random.Random(0)
    refusals = 0
    for _ in range(100):
        position, bit = chance.randrange(len(content)), chance.randrange(8)
        broken = bytearray(content)
        broken[position] ^= 1 << bit
        Path("x.pt").write_bytes(broken)
        try:
            found = foreign.read("x.pt")
        except bnnify.CheckpointError:
            refusals += 1
        else:
            foreign.not_finite(found.state_dict)
            if kind == "zip":
                assert found.state_dict.keys() == state.keys(), position
                assert all(torch.equal(state[key], value) for key, value in found.state_dict.items()), position
    assert refusals > (50 if kind == "zip" else 10)


@pytest.mark.parametrize("special", ["directory", "pipe", "nothing", "device", "NUL", "a long name", "a loop"])
def test_what_is_no_file_is_refused(special, tmp_path):
    path = tmp_path / "x.pt"
    if special == "directory":
        path.mkdir()
    elif special == "pipe":
        os.mkfifo(path)
    elif special == "device":
        path = Path("/dev/zero")
    elif special == "NUL":
        path = Path("x\0.pt")
        with pytest.raises(bnnify.CheckpointError, match="NUL"):
            foreign.read(path)
        return
    elif special == "a long name":
        path = tmp_path / ("x" * 300)
    elif special == "a loop":
        path.symlink_to(path)
    refused(path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(b"x")
    path.chmod(0)
    assert "permission denied" in refused(path)


def test_a_file_that_cannot_be_opened_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    path.write_bytes(b"x")

    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("bnnify.checkpoints.foreign.formats.open", denied, raising=False)
    assert "permission denied" in refused(path)


INDICES = {
    "a parent": {"w": "../x.safetensors"},
    "an absolute path": {"w": "/etc/passwd"},
    "an absolute checkpoint": {"w": "/tmp/x.safetensors"},
    "a Windows path": {"w": "..\\x.safetensors"},
    "a Windows drive": {"w": "C:x.safetensors"},
    "a folder": {"w": "sub/x.safetensors"},
    "NUL": {"w": "x.safetensors\0.bin"},
    "itself": {"w": "model.safetensors.index.json"},
    "the folder": {"w": "."},
    "the parent": {"w": ".."},
    "nothing": {"w": ""},
    "a number": {"w": 3},
    "a list": {"w": ["x.safetensors"]},
    "a file that is missing": {"w": "missing.safetensors"},
    "a link outside": {"w": "link.safetensors"},
    "a pipe": {"w": "pipe.safetensors"},
    "a tensor that is missing": {"w": "good.safetensors", "v": "good.safetensors"},
    "a pickle with code": {"w": "evil.bin"},
    "no files": {},
    "no map": None,
}


@pytest.mark.parametrize("weight_map", INDICES.values(), ids=INDICES)
def test_an_index_leads_nowhere_else(weight_map, tmp_path):
    torch_files = pytest.importorskip("safetensors.torch")
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for path in (tmp_path / "x.safetensors", folder / "good.safetensors", folder / "sub" / "x.safetensors"):
        path.write_bytes(torch_files.save({"w": torch.ones(2)}))
    (folder / "link.safetensors").symlink_to(tmp_path / "x.safetensors")
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "evil.bin").write_bytes(zipped(mapping(w=tensor(), x=call("os.system", SHELL))))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    for path in (index, folder):
        with pytest.raises(bnnify.CheckpointError) as caught:
            foreign.read(path)
        assert str(caught.value).isprintable()


def test_an_index_that_is_broken_is_refused(tmp_path):
    for content in [b"", b"{", b"[]", b"3", b"[" * 10**5, b'{"weight_map": ' + b"[" * 10**5, b"\xff\xfe", b"1" * 10**5]:
        path = tmp_path / "model.safetensors.index.json"
        path.write_bytes(content)
        refused(path)


def test_what_a_bomb_may_take_in_a_small_address_space(tmp_path):
    """The same in a process that has 1 GB for everything beyond torch itself, so that no allocation is merely lazy."""
    names = []
    asking = [content for case, content in memory_cases() if "**" in case or "expanded" in case or " of 4 GB" in case]
    for number, content in enumerate(asking):
        names.append(str(tmp_path / f"{number}.pt"))
        Path(names[-1]).write_bytes(content)
    script = """
import resource, sys
import bnnify
from bnnify.checkpoints.foreign import read_write as foreign
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
for name in sys.argv[1:]:
    try:
        foreign.read(name)
    except bnnify.CheckpointError as error:
        assert "MemoryError" not in str(error) and "alloc" not in str(error), error
    else:
        raise AssertionError(name)
"""
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, *names], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
