"""Files in shards are loaded into models that were converted on the meta device and sharded by FSDP2."""

import datetime
import multiprocessing

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import bnnify

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")
pytestmark = pytest.mark.skipif(
    not dist.is_gloo_available() or "forkserver" not in multiprocessing.get_all_start_methods(),
    reason="needs gloo, and processes forked from a server",
)


def config():
    return transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    )


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config())


def sharded_on_meta():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config())
    # Its frequencies are in no file.
    model.model.rotary_emb = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config())
    bnn = bnnify.convert(model, inplace=True)
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    return bnn


def compare(rank, folder):
    bnn = sharded_on_meta()
    bnnify.load_weights(bnn, folder / "llama.bnn")
    whole = bnnify.load(folder / "llama.bnn", llama())
    own = 0
    for name, wanted in whole.module.state_dict().items():
        found = bnn.module.state_dict()[name]
        if isinstance(found, DTensor):
            own += found.to_local().nbytes
            found = found.full_tensor()
        assert torch.equal(found, wanted), name
    everything = sum(value.nbytes for value in whole.module.state_dict().values())
    assert 0.49 * everything < own < 0.51 * everything
    ids = torch.arange(16).reshape(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(bnn.module(ids).logits, whole.module(ids).logits)
    output, kl = bnn(ids, labels=ids)
    torch.testing.assert_close(kl, whole.kl())
    (output.loss + kl / 100).backward()
    assert all(p.grad is not None for p in bnn.parameters() if p.requires_grad)

    # Weights that were never Bayesian: σ starts as it does when they are converted.
    plain = sharded_on_meta()
    bnnify.load_weights(plain, folder / "llama")
    for name, wanted in bnnify.convert(llama()).module.state_dict().items():
        found = plain.module.state_dict()[name]
        torch.testing.assert_close(found.full_tensor() if isinstance(found, DTensor) else found, wanted)


def test_each_rank_reads_its_own_part_of_a_file_in_shards(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "llama", max_shard_size="20KB")
    bnn = bnnify.convert(model)
    with torch.no_grad():
        for parameter in bnn.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    bnnify.save(bnn, tmp_path / "llama.bnn", max_shard_size="20KB")
    torch.multiprocessing.start_processes(_process, (tmp_path,), nprocs=2, daemon=True, start_method="forkserver")


def _process(rank, folder):
    torch.set_num_threads(1)
    there, limit = (folder / "rendezvous").as_uri(), datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=there, rank=rank, world_size=2, timeout=limit)
    compare(rank, folder)
    dist.barrier()
    dist.destroy_process_group()
