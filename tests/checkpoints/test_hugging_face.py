"""Hugging Face models keep what they are for: ties, generate(), checkpointing, files, adapters, the Trainer."""

import copy
import json
import logging

import pytest
import torch
import torch.nn.functional as F

import bnnify
from bnnify.cli.command import main
from bnnify.modules.parameters import bayesian_parameters, unique_bayesian_parameters

transformers = pytest.importorskip("transformers")

VOCABULARY = 23
SILENT = -200.0  # a rho for which softplus underflows: sigma is zero
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = TOKENS | {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}


def gpt2(**options):
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **TOKENS | options)
    return transformers.GPT2LMHeadModel(config).eval()


def llama(**options):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA | options)).eval()


def mixtral(**options):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **LLAMA | options)
    return transformers.MixtralForCausalLM(config).eval()


def albert(layers):
    torch.manual_seed(0)
    config = transformers.AlbertConfig(
        vocab_size=VOCABULARY,
        embedding_size=8,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_hidden_layers=layers,
        max_position_embeddings=32,
    )
    return transformers.AlbertModel(config).eval()


def wav2vec2():
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_feat_extract_layers=2,
        conv_dim=(8, 8),
        conv_stride=(2, 2),
        conv_kernel=(3, 3),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        vocab_size=VOCABULARY,
    )
    return transformers.Wav2Vec2ForCTC(config).eval()


def ids(*shape):
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


def greedy(model, **options):
    return model.generate(ids(1, 4), max_new_tokens=8, min_new_tokens=8, do_sample=False, **options)


@pytest.mark.parametrize("make", [gpt2, mixtral])
def test_generation_in_one_draw_is_one_networks_and_outside_of_any_the_originals(make):
    model = make()
    bnn = bnnify.convert(model, posterior_std=0.2)
    assert torch.equal(greedy(bnn.module), greedy(model))
    texts = set()
    for _ in range(4):
        with bnn.draw():
            text = greedy(bnn.module)
            assert torch.equal(text, greedy(bnn.module))
            assert torch.equal(text, greedy(bnn.module, use_cache=False))  # what was cached is of the same network
        texts.add(tuple(text[0].tolist()))
    assert len(texts) > 1
    assert torch.equal(greedy(bnn.module), greedy(model))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant):
    plain = gpt2(use_cache=False).double().train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    assert checkpointed.is_activation_checkpointing
    found = []
    for model in (plain, checkpointed):
        bnn = bnnify.convert(model)
        total = torch.zeros((), dtype=torch.float64)
        for seed in (1, 2, 3):
            torch.manual_seed(seed)
            output, kl = bnn(ids(2, 5))
            total = total + F.cross_entropy(output.logits.flatten(0, 1), ids(10)) + kl / 1000
        total.backward()
        found.append({name: parameter.grad for name, parameter in bnn.named_parameters() if parameter.requires_grad})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-12)
        assert gradient.abs().sum() > 0, name


@pytest.mark.parametrize("make", [gpt2, mixtral, wav2vec2])
def test_the_collapsed_model_is_saved_and_read_again_by_transformers(make, tmp_path):
    model = make()
    bnn = bnnify.convert(model)
    with torch.no_grad():
        for parameter in unique_bayesian_parameters(bnn.module):
            parameter.mean.add_(0.01)
    plain = bnnify.collapse(bnn)
    plain.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    inputs = torch.randn(1, 80) if make is wav2vec2 else ids(2, 5)
    assert torch.equal(again(inputs).logits, bnn.module(inputs).logits)
    assert not torch.equal(again(inputs).logits, model(inputs).logits)
    assert again.state_dict().keys() == model.state_dict().keys()


def test_the_output_has_the_structure_that_the_model_gives_it():
    model = gpt2()
    inputs = {"input_ids": ids(2, 5), "labels": ids(2, 5), "output_hidden_states": True}
    expected = model(**inputs)
    output, _ = bnnify.convert(model)(**inputs)
    assert type(output) is type(expected)
    assert list(output) == list(expected)
    assert type(output.past_key_values) is type(expected.past_key_values)
    assert [hidden.shape for hidden in output.hidden_states] == [hidden.shape for hidden in expected.hidden_states]
    samples = bnnify.convert(model).sample(**inputs, num_samples=3)
    assert type(samples) is type(expected)
    assert samples.logits.shape == (3, *expected.logits.shape)
    as_tuple, _ = bnnify.convert(model)(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple)


def test_albert_has_its_shared_layer_once_and_one_sample_of_it_in_all_passes():
    once, thrice = bnnify.convert(albert(1), posterior_std=0.1), bnnify.convert(albert(3), posterior_std=0.1)
    parameters = [[p.name for p in unique_bayesian_parameters(bnn.module)] for bnn in (once, thrice)]
    assert parameters[0] == parameters[1]
    assert torch.equal(once.kl(), thrice.kl())
    seen = []
    layer = thrice.module.encoder.albert_layer_groups[0].albert_layers[0].ffn
    layer.register_forward_hook(lambda module, args, output: seen.append(module.weight))
    thrice(ids(1, 4))
    assert len(seen) == 3
    assert seen[0] is seen[1] is seen[2]
    assert not torch.equal(seen[0], layer.weight)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_mixtral_experts_are_stochastic_by_default(implementation):
    model = mixtral(experts_implementation=implementation, num_hidden_layers=1)
    assert model.config._experts_implementation == implementation
    bnn = bnnify.convert(model)
    experts = {"model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"}
    found = {p.name: p for p in unique_bayesian_parameters(bnn.module)}
    assert experts <= found.keys()
    for name in experts:
        for parameter in found.values():
            parameter.rho.data.fill_(-1.0 if parameter.name == name else SILENT)
        with torch.no_grad():
            first, second = bnn(ids(1, 6))[0].logits, bnn(ids(1, 6))[0].logits
        assert not torch.equal(first, second), name
    for name in experts:
        found[name].rho.data.fill_(-1.0)
    bnn(ids(1, 6))[0].logits.square().sum().backward()
    for name in experts:
        gradient = found[name].rho.grad
        assert gradient.isfinite().all()
        assert (gradient.flatten(1).abs().sum(1) > 0).any()


ADAPTERS = "*.lora_*"


def lora(make):
    """A model with LoRA adapters, of which nothing has been trained: each lora_B is zero."""
    peft = pytest.importorskip("peft")
    targets, transposed = (["c_attn"], True) if make is gpt2 else (["q_proj", "v_proj"], False)
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=targets, fan_in_fan_out=transposed, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(make(), config).eval()


@pytest.mark.parametrize("make", [gpt2, llama])
def test_bayesian_lora_leaves_the_base_model_frozen_and_certain(make):
    model = lora(make)
    bnn = bnnify.convert(model, select=ADAPTERS)
    adapters = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert adapters
    assert {parameter.name for parameter in bayesian_parameters(bnn.module)} == adapters
    assert {p.requires_grad for n, p in bnn.module.named_parameters() if "lora_" not in n} == {False}
    assert all("lora_" in name for name in bnn.module.state_dict() if name.endswith("_rho"))
    with bnn.draw():
        assert not torch.equal(bnn.module(ids(2, 5)).logits, model(ids(2, 5)).logits)
        with bnn.module.disable_adapter():
            assert torch.equal(bnn.module(ids(2, 5)).logits, make()(ids(2, 5)).logits)


def test_the_sigma_of_a_fresh_lora_b_is_on_the_scale_of_its_layer_not_zero():
    bnn = bnnify.convert(lora(llama), select=ADAPTERS, posterior_std=bnnify.Relative(0.3))
    zeros = [p for p in unique_bayesian_parameters(bnn.module) if "lora_B" in p.name]
    assert len(zeros) == 4
    for parameter in zeros:
        assert not parameter.mean.any()
        scale = torch.tensor(0.3 / (3 * 2) ** 0.5).expand_as(parameter.rho)  # of rank 2
        torch.testing.assert_close(bnnify.distributions.gaussian.std(parameter.rho), scale)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_training_bayesian_lora_moves_only_the_adapters_and_they_can_be_merged_and_saved(make, tmp_path):
    peft = pytest.importorskip("peft")
    bnn = bnnify.convert(lora(make), select=ADAPTERS)
    before = copy.deepcopy(bnn.module.state_dict())
    optimizer = torch.optim.Adam(bnn.parameter_groups(lr=1e-2))
    for _ in range(3):
        optimizer.zero_grad()
        output, kl = bnn(input_ids=ids(4, 6), labels=ids(4, 6))
        bnnify.elbo(output.loss, kl, num_data=20).backward()
        optimizer.step()
    for name, value in bnn.module.state_dict().items():
        moves = "lora_" in name and not name.endswith(("_prior_mean", "_initial_std"))
        assert torch.equal(value, before[name]) != moves, name

    plain = bnnify.collapse(bnn)
    expected = bnn.module(ids(2, 5)).logits
    assert torch.equal(plain(ids(2, 5)).logits, expected)
    plain.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    assert torch.equal(again(ids(2, 5)).logits, expected)
    merged = plain.merge_and_unload()
    assert [type(module) for module in merged.modules()] == [type(module) for module in make().modules()]
    torch.testing.assert_close(merged(ids(2, 5)).logits, expected)
    assert not torch.allclose(make()(ids(2, 5)).logits, expected)


class ELBOTrainer(transformers.Trainer):
    """As in docs/recipes.md."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        output, kl = model(**inputs)
        loss = bnnify.elbo(output.loss, kl, num_data=self.num_data)
        return (loss, output) if return_outputs else loss


@pytest.fixture
def train(tmp_path):
    """Train a converted classifier of sequences with the Trainer."""
    pytest.importorskip("accelerate")

    def run(bnn, *, num_data, **options):
        examples = [{"input_ids": row, "labels": row[0] % 2} for row in ids(16, 4)]
        arguments = {"max_steps": 2, "per_device_train_batch_size": 8, "max_grad_norm": 0.0} | options
        arguments = transformers.TrainingArguments(
            tmp_path,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
            **arguments,
        )
        optimizer = torch.optim.SGD(bnn.parameter_groups(lr=1e-2, rho_lr=1e-1))
        trainer = ELBOTrainer(
            bnn, arguments, train_dataset=examples, eval_dataset=examples, optimizers=(optimizer, None)
        )
        trainer.num_data = num_data
        trainer.train()
        return trainer

    yield run
    assert not list(tmp_path.iterdir())


def classifier():
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=8, num_labels=2, **TOKENS)
    return bnnify.convert(transformers.GPT2ForSequenceClassification(config))


def test_the_trainer_trains_means_and_rhos(train):
    bnn = classifier()
    before = copy.deepcopy(bnn.state_dict())
    trainer = train(bnn, num_data=16)
    for parameter in unique_bayesian_parameters(bnn):
        assert not torch.equal(parameter.mean, before[parameter.name]), parameter.name
        assert not torch.equal(parameter.rho, before[parameter.name + "_rho"]), parameter.name
    assert trainer.evaluate()["eval_loss"] > 0
    # The Trainer cannot gather a cache, whose name has changed; it looks for it in a config, which a wrapper has not.
    found = trainer.predict(trainer.eval_dataset, ignore_keys=["past_key_values", "cache"])
    assert found.predictions.shape == (16, 2)


def test_the_trainer_minimises_the_elbo_of_the_whole_data_set(train):
    """With a posterior far from its prior and few data, the loss is mostly KL, and grows as the data get fewer."""
    bnn = classifier()
    for parameter in unique_bayesian_parameters(bnn):
        parameter.rho.data.add_(1.0)
    kl = bnn.kl().item()
    losses = [
        train(copy.deepcopy(bnn), num_data=num_data, max_steps=1).state.log_history[-1]["train_loss"]
        for num_data in (100, 1000)
    ]
    assert losses[0] - losses[1] == pytest.approx(kl / 100 - kl / 1000, rel=0.05)


def test_accumulating_gradients_over_batches_takes_their_mean(train):
    """Two half batches must move the parameters as far as one; a sum of the two would move them twice as far."""
    moved = []
    for size, steps in ((8, 1), (4, 2)):
        bnn = classifier()
        for parameter in unique_bayesian_parameters(bnn):
            parameter.rho.data.add_(1.0)  # the KL dominates the gradient of rho, and has no noise
        before = bnn.module.score.weight_rho.detach().clone()
        train(bnn, num_data=1, max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=steps)
        moved.append((bnn.module.score.weight_rho - before).norm())
    torch.testing.assert_close(moved[0], moved[1], rtol=0.1, atol=0.0)


# --- Folders as they are published ------------------------------------------------------------------------------------


def bert(cls, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return cls(transformers.BertConfig(vocab_size=VOCABULARY, **sizes, **options)).eval()


def t5():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes)
    return transformers.T5ForConditionalGeneration(config).eval()


def marian():
    torch.manual_seed(0)
    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in SIZES.items()}
    sizes |= {"vocab_size": VOCABULARY, "d_model": 16}
    config = transformers.MarianConfig(pad_token_id=0, decoder_start_token_id=0, **sizes)
    return transformers.MarianMTModel(config).eval()


SIZES = {"layers": 1, "attention_heads": 2, "ffn_dim": 16}
DECODER = "cls.predictions.decoder"  # of the same weights as the embedding


def tied_llama():
    return llama(tie_word_embeddings=True)


def masked_bert():
    return bert(transformers.BertForMaskedLM)


def renamed(*pairs):
    def rename(name):
        for old, new in pairs:
            name = name.replace(old, new)
        return name

    return rename


# What makes the model, how its names are in the files, which are not there, and what else is.
LAYOUTS = {
    "as it is saved today": (gpt2, renamed(), ("lm_head",), {}),
    "gpt2: neither prefix nor head, and masks": (
        gpt2,
        renamed(("transformer.", "")),
        ("lm_head",),
        {"h.0.attn.bias": torch.ones(1, 1, 32, 32)},
    ),
    "bert: gamma and beta": (
        masked_bert,
        renamed(("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")),
        (DECODER,),
        {},
    ),
    "bert: another task's head": (
        masked_bert,
        renamed(),
        (DECODER,),
        {"cls.seq_relationship.weight": torch.zeros(2, 16), "cls.seq_relationship.bias": torch.zeros(2)},
    ),
    "bert: position_ids": (
        masked_bert,
        renamed(),
        (DECODER,),
        {"bert.embeddings.position_ids": torch.arange(512)[None]},
    ),
    "t5: a bias without use": (
        t5,
        renamed(),
        ("lm_head", "encoder.embed", "decoder.embed"),
        {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.zeros(32, 2)},
    ),
    "llama: inv_freq": (llama, renamed(), (), {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
    "llama: a tied head, all names with one prefix": (tied_llama, renamed(), ("lm_head",), {}),
    "wav2vec2: weight_g and weight_v": (
        wav2vec2,
        renamed(("parametrizations.weight.original0", "weight_g"), ("parametrizations.weight.original1", "weight_v")),
        (),
        {},
    ),
    "marian: positions are computed": (
        marian,
        renamed(),
        ("model.encoder.embed", "model.decoder.embed", "lm_head"),
        {},
    ),
}


def publish(model, folder, rename=lambda name: name, drop=(), more=None, kind="safetensors", shards=1):
    """Write the folder of a model as its owner did."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    kept = {name: value for name, value in model.state_dict().items() if not name.startswith(tuple(drop) or "!")}
    write(folder, {rename(name): value.clone() for name, value in kept.items()} | (more or {}), kind, shards)


def write(folder, state, kind="safetensors", shards=1):
    stem = "model" if kind == "safetensors" else "pytorch_model"
    names = {name: f"{stem}{f'-{index % shards}' if shards > 1 else ''}.{kind}" for index, name in enumerate(state)}
    for file in set(names.values()):
        part = {name: value for name, value in state.items() if names[name] == file}
        if kind == "safetensors":
            pytest.importorskip("safetensors.torch").save_file(part, folder / file, {"format": "pt"})
        else:
            torch.save(part, folder / file)
    if shards > 1:
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": names}))


@pytest.mark.parametrize(("make", "rename", "drop", "more"), LAYOUTS.values(), ids=LAYOUTS)
def test_a_published_layout_converts_loads_and_collapses_to_what_transformers_loads(
    make, rename, drop, more, tmp_path, capfd
):
    folder, back = tmp_path / "published", tmp_path / "back"
    folder.mkdir()
    publish(make(), folder, rename, drop, more)
    wanted = type(make()).from_pretrained(folder).eval().state_dict()
    capfd.readouterr()
    assert main(["-q", "convert", str(folder), "-o", str(tmp_path / "x.bnn.pt")]) == 0
    assert capfd.readouterr() == ("", "")  # none of transformers' reports and progress bars
    loaded = bnnify.load(tmp_path / "x.bnn.pt")
    assert_equal_states(bnnify.collapse(loaded).state_dict(), wanted)
    assert loaded.kl().isfinite()

    back.mkdir()
    (folder / "config.json").rename(back / "config.json")
    assert main(["-q", "collapse", str(tmp_path / "x.bnn.pt"), "-o", str(back / "model.safetensors")]) == 0
    again, found = type(make()).from_pretrained(back, output_loading_info=True)
    assert not found["missing_keys"] | found["unexpected_keys"]
    assert_equal_states(again.state_dict(), wanted)


def assert_equal_states(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(("make", "kind", "shards"), [(gpt2, "bin", 1), (gpt2, "safetensors", 3), (mixtral, "bin", 3)])
def test_shards_and_pickles_are_read_by_the_same_rules(make, kind, shards, tmp_path):
    """A mixture of experts has its experts one by one in the files, and together in the model."""
    make().save_pretrained(tmp_path / "saved")
    state = pytest.importorskip("safetensors.torch").load_file(tmp_path / "saved" / "model.safetensors")
    (tmp_path / "folder").mkdir()
    (tmp_path / "saved" / "config.json").rename(tmp_path / "folder" / "config.json")
    state = {name.removeprefix("transformer."): value for name, value in state.items()}
    write(tmp_path / "folder", state, kind, shards)
    bnn = bnnify.convert_checkpoint(tmp_path / "folder")
    assert_equal_states(bnnify.collapse(bnn).state_dict(), make().state_dict())


@pytest.mark.parametrize(
    ("of_file", "of_config"), [("float32", "bfloat16"), ("bfloat16", None), ("float16", "float32")]
)
def test_the_dtype_is_the_one_that_transformers_takes(of_file, of_config, tmp_path):
    publish(llama().to(getattr(torch, of_file)), tmp_path)
    change_config(tmp_path, dtype=of_config)
    wanted = transformers.LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    assert_equal_states(bnnify.collapse(bnnify.convert_checkpoint(tmp_path)).state_dict(), wanted)


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["BertModel"]}, "BertModel.*missing: .*`pooler.dense.bias`.*from_pretrained"),
        ({"vocab_size": VOCABULARY + 1}, r"of another shape: .*\(23, 16\) for \(24, 16\)"),
    ],
    ids=["missing", "of another shape"],
)
def test_weights_that_transformers_would_start_at_random_are_refused_by_name(change, said, tmp_path):
    publish(masked_bert(), tmp_path, drop=(DECODER,))
    change_config(tmp_path, **change)
    with pytest.raises(bnnify.CheckpointError, match=said):
        bnnify.convert_checkpoint(tmp_path)


def test_weights_for_which_the_model_has_no_place_are_named_and_left_out(tmp_path, capsys):
    *_, more = LAYOUTS["bert: another task's head"]
    publish(masked_bert(), tmp_path, drop=(DECODER,), more=more)
    assert main(["convert", str(tmp_path), "-o", str(tmp_path / "x.bnn.pt")]) == 0
    assert "no place for it: `cls.seq_relationship.bias`, `cls.seq_relationship.weight`\n" in capsys.readouterr().out


def test_transformers_is_left_as_talkative_as_it_was(tmp_path):
    its_logging = transformers.utils.logging
    publish(gpt2(), tmp_path)
    before = its_logging.get_verbosity(), its_logging.is_progress_bar_enabled()
    its_logging.set_verbosity(logging.INFO)
    bnnify.convert_checkpoint(tmp_path)
    assert (its_logging.get_verbosity(), its_logging.is_progress_bar_enabled()) == (logging.INFO, before[1])
    its_logging.set_verbosity(before[0])


def test_a_config_asks_for_no_more_memory_than_its_files_account_for(tmp_path):
    publish(gpt2(), tmp_path)
    change_config(tmp_path, vocab_size=10**10)
    with pytest.raises(bnnify.CheckpointError, match=r"config is for a model of [\d,]+ numbers, but the file has"):
        bnnify.convert_checkpoint(tmp_path)


def test_no_code_in_a_model_folder_runs(tmp_path, monkeypatch):
    """Neither that of a module beside the weights nor that of a pickle."""
    publish(gpt2(), tmp_path, kind="bin")
    (tmp_path / "evil.py").write_text("import pathlib\n\npathlib.Path('canary').touch()\n")
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text((tmp_path / "evil.py").read_text())
    auto_map = {"AutoModelForCausalLM": "evil.Evil"}
    change_config(tmp_path, auto_map=auto_map, transformers_weights="../evil.safetensors")
    monkeypatch.chdir(tmp_path)
    assert isinstance(bnnify.convert_checkpoint(tmp_path).module, transformers.GPT2LMHeadModel)
    assert not (tmp_path / "canary").exists()


def test_a_folder_of_timms_is_recognised_by_its_tensors(tmp_path):
    timm = pytest.importorskip("timm")
    write(tmp_path, timm.create_model("test_resnet", num_classes=7).state_dict())
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_resnet", "num_classes": 7}))
    assert str(bnnify.convert_checkpoint(tmp_path).origin.recipe) == "timm test_resnet(num_classes=7)"
