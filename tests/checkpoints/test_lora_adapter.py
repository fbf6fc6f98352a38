"""LoRA adapters as peft writes them: converted on the base that they were trained on, saved, read and given back."""

import json
import socket
import sys

import pytest
import torch

import bnnify
from bnnify.checkpoints.foreign.read_write import read
from bnnify.cli.command import main
from bnnify.modules.parameters import bayesian_parameters

from .test_hugging_face import change_config, gpt2, ids, llama, publish, transformers

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def tied_llama():
    return llama(tie_word_embeddings=True)


def half_llama():
    return llama().to(torch.bfloat16)


def as_classifier(base):
    """The base as transformers makes it for three classes: with a head that nothing has trained."""
    return transformers.LlamaForSequenceClassification.from_pretrained(base, num_labels=3)


def as_it_is(base):
    return transformers.AutoModelForCausalLM.from_pretrained(base)


QV = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
# What makes the base, how peft's users load it, and the config of the adapter.
ADAPTERS = {
    "llama": (tied_llama, as_it_is, QV | {"lora_dropout": 0.1}),
    "gpt2: Conv1D": (gpt2, as_it_is, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "half precision": (half_llama, as_it_is, QV),
    "dora, rank-stabilised": (llama, as_it_is, QV | {"use_dora": True, "use_rslora": True}),
    "a regex and ranks of its own": (
        llama,
        as_it_is,
        {"target_modules": r".*\.1\..*(up|down)_proj", "rank_pattern": {"up_proj": 3}, "alpha_pattern": {"up_proj": 5}},
    ),
    "one layer, biases": (
        gpt2,
        as_it_is,
        {"target_modules": ["c_fc"], "layers_to_transform": [1], "bias": "lora_only"},
    ),
    "embeddings": (llama, as_it_is, {"target_modules": ["embed_tokens", "q_proj"]}),
    "a head of its own": (llama, as_classifier, {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"}),
}


@pytest.fixture
def publish_adapter(tmp_path):
    """Write the directories of a base and of an adapter on it as their owners did, and return both."""

    def make(make_base=tied_llama, load=as_it_is, options=QV, safe=True):
        base, folder = tmp_path / "base", tmp_path / "adapter"
        base.mkdir()
        publish(make_base(), base)
        torch.manual_seed(0)
        model = peft.get_peft_model(load(base), peft.LoraConfig(**{"r": 2, "lora_alpha": 3} | options))
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder, safe_serialization=safe)
        return base, folder

    return make


def tensors_in(folder):
    return read(folder, names=()).state_dict


def logits(model):
    with torch.no_grad():
        return model(ids(2, 5)).logits


@pytest.mark.parametrize(("make_base", "load", "options"), ADAPTERS.values(), ids=ADAPTERS)
def test_the_posterior_mean_is_what_peft_loads_also_from_the_file_and_after_collapse(
    make_base, load, options, publish_adapter, tmp_path
):
    base, folder = publish_adapter(make_base, load, options)
    wanted = peft.PeftModel.from_pretrained(load(base), folder).eval()
    bnn = bnnify.convert_checkpoint(folder, base=base)
    assert torch.equal(logits(bnn.module), logits(wanted))
    assert {n: p.dtype for n, p in wanted.named_parameters()} == {
        n: p.dtype for n, p in bnn.module.named_parameters() if not n.endswith(("_rho", "_prior_mean"))
    }
    matrices = [value for value in tensors_in(folder).values() if value.ndim > 1]
    assert len(list(bayesian_parameters(bnn.module))) == len(matrices)
    with torch.no_grad(), bnn.draw():
        assert not torch.equal(logits(bnn.module), logits(wanted))

    bnnify.save(bnn, tmp_path / "x.bnn.pt")
    again = bnnify.load(tmp_path / "x.bnn.pt")
    assert again.state_dict().keys() == bnn.state_dict().keys()
    for name, value in bnn.state_dict().items():
        assert again.state_dict()[name].dtype == value.dtype
        assert torch.equal(again.state_dict()[name], value), name
    assert torch.equal(again.kl(), bnn.kl())
    assert {n: p.requires_grad for n, p in again.named_parameters()} == {
        n: p.requires_grad for n, p in bnn.named_parameters()
    }

    back = tmp_path / "back"
    back.mkdir()
    (back / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    assert main(["-q", "collapse", str(tmp_path / "x.bnn.pt"), "-o", str(back / "adapter_model.safetensors")]) == 0
    assert tensors_in(back).keys() == tensors_in(folder).keys()
    assert torch.equal(logits(peft.PeftModel.from_pretrained(load(base), back).eval()), logits(wanted))


@pytest.mark.parametrize("make_base", [tied_llama, half_llama])
def test_training_moves_the_adapter_alone_and_peft_saves_it(make_base, publish_adapter, tmp_path):
    base, folder = publish_adapter(make_base)
    bnn = bnnify.convert_checkpoint(folder, base=base)
    before = {name: value.clone() for name, value in bnn.module.state_dict().items()}
    optimizer = torch.optim.Adam(bnn.parameter_groups(lr=1e-2))
    output, kl = bnn(input_ids=ids(4, 6), labels=ids(4, 6))
    bnnify.elbo(output.loss, kl, num_data=20).backward()
    optimizer.step()
    for name, value in bnn.module.state_dict().items():
        moves = "lora_" in name and not name.endswith(("_prior_mean", "_initial_std"))
        assert torch.equal(value, before[name]) != moves, name
    bnnify.collapse(bnn).save_pretrained(tmp_path / "saved")
    saved = peft.PeftModel.from_pretrained(as_it_is(base), tmp_path / "saved").eval()
    assert torch.equal(logits(saved), logits(bnn.module))
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)


def test_the_command_converts_describes_and_gives_back_an_adapter_in_a_pickle(publish_adapter, tmp_path, capsys):
    base, folder = publish_adapter(safe=False)
    change_adapter(folder, base_model_name_or_path="owner/name", revision="v1")
    file = tmp_path / "x.bnn.safetensors"
    assert main(["convert", str(folder), "--base", str(base), "-o", str(file), "--select", "*q_proj.lora_A*"]) == 0
    out = capsys.readouterr().out
    assert "trained on `owner/name`, revision `v1`" in out
    assert "2 of 28 parameters Bayesian" in out
    assert main(["inspect", str(file)]) == 0
    assert "LoRA adapter on `owner/name`" in capsys.readouterr().out
    assert main(["-q", "collapse", str(file), "-o", str(tmp_path / "adapter_model.bin")]) == 0
    found = torch.load(tmp_path / "adapter_model.bin")
    assert found.keys() == tensors_in(folder).keys()
    assert all(torch.equal(found[name], value) for name, value in tensors_in(folder).items())


def change_adapter(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_without_its_base_an_adapter_is_refused_with_the_name_of_what_is_missing(publish_adapter, capsys):
    _, folder = publish_adapter()
    change_adapter(folder, base_model_name_or_path="owner/name", revision="v1")
    for path in (folder, folder / "adapter_model.safetensors"):
        assert main(["convert", str(path)]) == 1
        said = capsys.readouterr().err
        for part in (str(path), "`owner/name`", "`v1`", "`CAUSAL_LM`", "--base"):
            assert part in said
    assert not list(folder.parent.glob("*.bnn.pt"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "kind `IA3`"),
        ({"peft_type": None}, "kind `None`"),
        ({"init_lora_weights": "pissa"}, "`init_lora_weights=pissa`"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "`layer_replication`"),
        ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, "`megatron_config`"),
        ({"a_key_of_tomorrow": "on"}, "`a_key_of_tomorrow`"),
        ({"r": 10**9}, r"is \(2, 16\) in the file and \(1000000000, 16\) on this base"),
        ({"r": "8"}, "peft cannot"),
        ({"rank_pattern": [3]}, "peft cannot"),
        ({"target_modules": ["nothing"]}, "peft cannot .* trained on"),
        ({"target_modules": ["q_proj"]}, "without a place: .*v_proj"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "missing: .*o_proj"),
        ({"r": 1}, r"q_proj.lora_A.weight` is \(2, 16\) in the file and \(1, 16\) on this base"),
    ],
)
def test_a_config_that_does_not_say_what_the_tensors_are_is_refused(changes, said, publish_adapter):
    base, folder = publish_adapter()
    change_adapter(folder, **changes)
    with pytest.raises(bnnify.CheckpointError, match=said):
        bnnify.convert_checkpoint(folder, base=base)


def test_another_base_is_refused_by_the_first_tensor_that_does_not_fit(publish_adapter, tmp_path):
    _, folder = publish_adapter()
    other = tmp_path / "other"
    other.mkdir()
    publish(llama(hidden_size=32), other)
    with pytest.raises(bnnify.CheckpointError, match=r"layers.0.self_attn.q_proj.lora_A.weight` is \(2, 16\) in the"):
        bnnify.convert_checkpoint(folder, base=other)


def test_a_base_and_an_adapter_are_not_taken_for_each_other(publish_adapter):
    base, folder = publish_adapter()
    with pytest.raises(bnnify.CheckpointError, match="is no adapter"):
        bnnify.convert_checkpoint(base, base=base)
    with pytest.raises(bnnify.CheckpointError, match="is not the directory of a model"):
        bnnify.convert_checkpoint(folder, base=folder)
    with pytest.raises(bnnify.ArgumentError, match="not both"):
        bnnify.convert_checkpoint(folder, llama, base=base)
    (base / "model.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(bnnify.CheckpointError, match="holds a model and an adapter"):
        bnnify.convert_checkpoint(folder, base=base)


def test_nothing_is_looked_up_and_no_code_beside_the_weights_runs(publish_adapter, tmp_path, monkeypatch):
    base, folder = publish_adapter()
    for place in (base, folder, tmp_path):
        (place / "evil.py").write_text(f"import pathlib\n\npathlib.Path({str(tmp_path / 'canary')!r}).touch()\n")
    change_config(base, auto_map={"AutoModelForCausalLM": "evil.Evil"})
    change_adapter(
        folder,
        base_model_name_or_path="owner/name",
        auto_mapping={"base_model_class": "Evil", "parent_library": "evil"},
        megatron_core="evil",
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def refuse(*args):
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    bnnify.save(bnnify.convert_checkpoint(folder, base=base), tmp_path / "x.bnn.pt")
    bnnify.load(tmp_path / "x.bnn.pt")
    assert not (tmp_path / "canary").exists()


def test_a_file_asks_for_no_adapter_but_that_of_its_tensors(publish_adapter, tmp_path):
    base, folder = publish_adapter()
    bnnify.save(bnnify.convert_checkpoint(folder, base=base), tmp_path / "x.bnn.pt")
    content = torch.load(tmp_path / "x.bnn.pt")
    content["bnnify"]["adapter"]["r"] = 10**9
    torch.save(content, tmp_path / "x.bnn.pt")
    with pytest.raises(bnnify.CheckpointError, match="not those of the adapter on its base"):
        bnnify.load(tmp_path / "x.bnn.pt")


def test_a_missing_peft_is_named(publish_adapter, monkeypatch):
    base, folder = publish_adapter()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(bnnify.MissingLibraryError, match="pip install peft"):
        bnnify.convert_checkpoint(folder, base=base)
