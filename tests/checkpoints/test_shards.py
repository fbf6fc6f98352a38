"""Files in shards with an index, as Hugging Face writes large models."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import bnnify
from bnnify.checkpoints.foreign import shards
from bnnify.checkpoints.foreign.read_write import read
from bnnify.cli.command import main

from .. import zoo

safetensors = pytest.importorskip("safetensors.torch")
INDEX = "model.safetensors.index.json"


def network(width=16, depth=6):
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(width, width) for _ in range(depth)])


def names_in(folder):
    return {file.name: set(safetensors.load_file(file)) for file in folder.glob("*.safetensors")}


def assert_equal_states(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("dtype", [None, "int8"])
@pytest.mark.parametrize("name", ["root_linear", "residual_block", "tied_language_model", "lstm", "bfloat16"])
def test_shards_hold_what_one_file_holds_and_each_the_whole_of_its_parameters(name, dtype, tmp_path):
    model, _ = zoo.build(name)
    bnn = bnnify.convert(model, prior=bnnify.Pretrained())
    with torch.no_grad():
        for parameter in bnn.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    bnnify.save(bnn, tmp_path / "one.safetensors", dtype=dtype)
    bnnify.save(bnn, tmp_path / "many", dtype=dtype, max_shard_size=1)
    for path in (tmp_path / "many", tmp_path / "many" / INDEX):
        found = bnnify.load(path, zoo.build(name)[0])
        assert_equal_states(found.state_dict(), bnnify.load(tmp_path / "one.safetensors", model).state_dict())
    means = bnnify.collapse(bnn).state_dict().keys()
    for names in names_in(tmp_path / "many").values():
        # One byte is less than any parameter: each stands alone, with what belongs to it.
        assert len({max((m for m in means if each.startswith(m)), key=len) for each in names}) == 1


def test_no_shard_is_larger_than_it_may_be_and_the_index_is_that_of_hugging_face(tmp_path):
    bnnify.save(bnnify.convert(network()), tmp_path / "many", max_shard_size="8KB")
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    found = names_in(tmp_path / "many")
    assert sorted(found) == [f"model-{n:05d}-of-{len(found):05d}.safetensors" for n in range(1, len(found) + 1)]
    assert len(found) > 2
    assert index["weight_map"] == {name: file for file, names in found.items() for name in names}
    sizes = [sum(t.nbytes for t in safetensors.load_file(tmp_path / "many" / file).values()) for file in found]
    assert max(sizes) <= 8000
    assert index["metadata"]["total_size"] == sum(sizes)


def test_the_command_makes_the_same_of_a_checkpoint_in_shards_and_of_one_in_one_file(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "llama", max_shard_size="20KB")
    model.save_pretrained(tmp_path / "whole")
    assert len(list((tmp_path / "llama").glob("*.safetensors"))) > 3

    # So small that the embedding, which has no σ, stands alone.
    assert main(["-q", "convert", str(tmp_path / "llama"), "--max-shard-size", "9KB"]) == 0
    assert main(["-q", "convert", str(tmp_path / "whole")]) == 0
    many, one = tmp_path / "llama.bnn", tmp_path / "whole.bnn.pt"
    assert len(list(many.glob("*.safetensors"))) > 3
    assert_equal_states(bnnify.load(many).state_dict(), bnnify.load(one).state_dict())

    capsys.readouterr()
    told = []
    for path in (many, one):
        assert main(["inspect", str(path), "--json"]) == 0
        told.append({each["name"]: each for each in json.loads(capsys.readouterr().out)["parameters"]})
    assert told[0] == told[1]

    assert main(["-q", "collapse", str(many)]) == 0
    again, found = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "llama.collapsed", output_loading_info=True)
    assert not found["missing_keys"] | found["unexpected_keys"]
    assert_equal_states(again.state_dict(), model.state_dict())
    assert main(["-q", "collapse", str(many / INDEX), "-o", str(tmp_path / "x.safetensors")]) == 0
    assert_equal_states(safetensors.load_file(tmp_path / "x.safetensors"), read(tmp_path / "whole").state_dict)


PEAK = """
import re, sys
from pathlib import Path
from bnnify.checkpoints.collapse_shards import collapse_shards

def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])

collapse_shards(sys.argv[1], sys.argv[1] + ".first")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = peak()
collapse_shards(sys.argv[2], sys.argv[2] + ".plain")
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts the memory of a process in kilobytes")
def test_collapsing_shards_holds_one_of_them_at_a_time(tmp_path):
    bnnify.save(bnnify.convert(network()), tmp_path / "small", max_shard_size="2KB")
    bnn = bnnify.convert(network(1024, 10), prior=bnnify.Gaussian(std=1.0), for_writing=True)
    bnnify.save(bnn, tmp_path / "large", max_shard_size="9MB")
    assert len(names_in(tmp_path / "large")) == 10
    run = [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "large")]
    peak = int(subprocess.run(run, check=True, capture_output=True, text=True).stdout) * 1024
    assert peak < 1.3 * 9e6  # the means of all ten take 42 MB
    assert_equal_states(read(tmp_path / "large.plain").state_dict, bnnify.collapse(bnn).state_dict())


def first(folder):
    return folder / sorted(names_in(folder))[0]


def change_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


DAMAGES = {
    "a shard is missing": (lambda d: first(d).unlink(), r"`.*model-00001-of-\d+\.safetensors`: no such file"),
    "a shard was cut off": (
        lambda d: first(d).write_bytes(first(d).read_bytes()[:-8]),
        r"`.*model-00001-of-\d+\.safetensors`: it is damaged",
    ),
    "a shard is another one": (
        lambda d: safetensors.save_file({"other": torch.ones(2)}, first(d)),
        r"`.*model-00001-of-\d+\.safetensors`: it lacks `0\.\w+`, which the index says it has",
    ),
    "the index names what no shard has": (
        lambda d: change_index(d, lambda i: i["weight_map"].update(more=first(d).name)),
        r"`.*model-00001-of-\d+\.safetensors`: it lacks `more`",
    ),
    "a weight is of another shape than its rho": (
        lambda d: safetensors.save_file({n: torch.ones(len(n)) for n in safetensors.load_file(first(d))}, first(d)),
        r"is damaged: .*`0\.\w+` is missing, or its shape",
    ),
    "the index names less than the record": (
        lambda d: change_index(
            d, lambda i: [i["weight_map"].pop(n) for n in [*i["weight_map"]] if n[:8] == "5.weight"]
        ),
        r"is damaged: .*5\.weight",
    ),
    "the record is no longer there": (
        lambda d: change_index(d, lambda i: i["metadata"].pop("bnnify")),
        "was not written by bnnify",
    ),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_shards_are_refused_by_name_and_nothing_is_written(damage, said, tmp_path, capsys):
    bnnify.save(bnnify.convert(network()), tmp_path / "x.bnn", max_shard_size="2KB")
    damage(tmp_path / "x.bnn")
    with pytest.raises(bnnify.CheckpointError, match=said):
        bnnify.load(tmp_path / "x.bnn", network())
    for command in ("collapse", "inspect"):
        assert main([command, str(tmp_path / "x.bnn")]) == 1
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["x.bnn"]


def test_a_folder_is_new_or_it_is_not_written(tmp_path, monkeypatch):
    bnn = bnnify.convert(network())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(bnnify.CheckpointError, match="shards are written into a new folder"):
        bnnify.save(bnn, tmp_path / "full", max_shard_size="2KB")

    class OfAFullDisk:
        class torch:
            @staticmethod
            def save_file(tensors, file, metadata):
                if "00002" in file.name:
                    raise OSError(28, "No space left on device")
                safetensors.save_file(tensors, file, metadata)

    monkeypatch.setattr(shards, "import_safetensors", lambda: OfAFullDisk)
    with pytest.raises(bnnify.CheckpointError, match=r"Cannot write `.*new`: No space left"):
        bnnify.save(bnn, tmp_path / "new", max_shard_size="2KB")
    assert [file.name for file in tmp_path.iterdir()] == ["full"]


@pytest.mark.parametrize("size", [0, -1, True, "5 apples", "GB", 1.5, "0"])
def test_what_is_no_size_is_refused(size, tmp_path):
    with pytest.raises(bnnify.ArgumentError, match="max_shard_size must be"):
        bnnify.save(bnnify.convert(network()), tmp_path / "x", max_shard_size=size)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", [".bnn.pt", ".bnn", f".bnn/{INDEX}"])
def test_a_file_is_loaded_into_a_model_that_was_converted_without_values(ending, tmp_path):
    bnn = bnnify.convert(network())
    with torch.no_grad():
        for parameter in bnn.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    bnnify.save(bnn, tmp_path / "x.bnn.pt")
    bnnify.save(bnn, tmp_path / "x.bnn", max_shard_size="2KB")
    with torch.device("meta"):
        found = bnnify.convert(network())
    bnnify.load_weights(found, f"{tmp_path}/x{ending}")
    assert_equal_states(found.state_dict(), bnn.state_dict())


def test_weights_in_shards_that_were_never_bayesian_are_loaded_as_a_state_dict_is(tmp_path):
    plain = network()
    shards.write_shards(tmp_path / "x", [plain.state_dict()], 1, metadata={})
    with torch.device("meta"):
        found, wanted = bnnify.convert(network()), bnnify.convert(network())
    bnnify.load_weights(found, tmp_path / "x")
    bnnify.load_weights(wanted, plain.state_dict())
    assert_equal_states(found.state_dict(), wanted.state_dict())
