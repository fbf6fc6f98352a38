"""What comes before the Bayesian weights is computed once, and every output is that of the plain loop, bit for bit."""

import copy
import functools
import os
import random
import time
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import bnnify
from bnnify.modules.parameters import bayesian_parameters
from bnnify.prediction import trunk
from bnnify.prediction.known_code import is_known
from tests import zoo

K = 4
CALLS: list[None] = []  # of the first layer of the trunk


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    CALLS.clear()


@pytest.fixture
def trusted(monkeypatch):
    """Takes every model for published code, so that operations alone have to tell whether a recording is of use."""
    monkeypatch.setattr(trunk, "is_known", lambda module: True)


class Counted(nn.Linear):
    def forward(self, x):
        CALLS.append(None)
        return super().forward(x)


class Network(nn.Module):
    """A trunk and a head, and what happens before, between and after them."""

    def __init__(self, between=lambda hidden: hidden, after=lambda output, hidden: output, before=lambda x: x):
        super().__init__()
        self.trunk = Counted(4, 8)
        self.head = nn.Linear(8, 3)
        self.before, self.between, self.after = before, between, after

    def forward(self, x):
        hidden = self.between(self.trunk(self.before(x)))
        return self.after(self.head(hidden), hidden)


def seed_everything():
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)


def plain_loop(bnn, args):
    seed_everything()
    with torch.no_grad():
        outputs, args = [], copy.deepcopy(args)
        for _ in range(K):
            with bnnify.Draw(bayesian_parameters(bnn.module)):
                outputs.append(copy.deepcopy(bnn.module(*args)))
        return outputs


def predicted(bnn, args):
    """The outputs that ``predict`` averages."""
    seed_everything()
    outputs = []

    def note(output):
        outputs.append(copy.deepcopy(output))
        return zoo.tensors(output)[0]

    bnn.predict(tuple(copy.deepcopy(args)), K, output=note)
    return outputs


def check(build, args, select="head"):
    """The number of forwards of the trunk in ``predict``, which has to give what the plain loop gives."""
    bnn, other = (bnnify.convert(build(), select=select, inplace=True).eval() for _ in range(2))
    other.load_state_dict(bnn.state_dict())
    expected = plain_loop(bnn, args)
    CALLS.clear()
    found = predicted(other, args)
    for a, b in zip(found, expected, strict=True):
        assert type(a) is type(b)
        assert zoo.equal(a, b)
    for a, b in zip(other.state_dict().values(), bnn.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    return len(CALLS)


def x():
    return (torch.randn(5, 4),)


@pytest.fixture
def replays(monkeypatch):
    """One entry for each output for which Python did not run."""
    replayed = []
    replay = trunk.Tape.replay

    def noting(tape, samples):
        output = replay(tape, samples)
        replayed.append(None)
        return output

    monkeypatch.setattr(trunk.Tape, "replay", noting)
    return replayed


# Published models


# Of torch's own layers throughout, of which the last two Bayesian parameters leave a weight that is not needed again.
WITH_TRUNK = {"mlp", "conv2d", "transposed", "encoder", "transformer", "swin"}


@pytest.mark.parametrize("name", zoo.ZOO)
def test_every_model_with_only_its_last_weights_bayesian(name, replays):
    model, inputs = zoo.build(name)
    names = [parameter.name for parameter in bayesian_parameters(bnnify.convert(model).module)]
    check(zoo.ZOO[name].build, inputs, select=names[-2:])
    assert len(replays) == (K - 1 if name in WITH_TRUNK else 0)


@pytest.mark.parametrize("select", ["fc", ["layer4", "fc"], "layer2"])
def test_a_residual_network(select, replays):
    torchvision = pytest.importorskip("torchvision")
    check(lambda: torchvision.models.resnet18(num_classes=5), (torch.randn(2, 3, 32, 32),), select)
    assert len(replays) == K - 1


def language_model(name):
    transformers = pytest.importorskip("transformers")
    special = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False}
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if name == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, **special))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, intermediate_size=16))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_language_model_with_its_default_cache(name, replays):
    bnn = bnnify.convert(language_model(name).eval(), select="lm_head")
    tokens = {"input_ids": torch.randint(50, (2, 6))}
    torch.manual_seed(1)
    prediction = bnn.predict(tokens, K, output="logits", likelihood="logits")
    assert len(replays) == K - 1
    torch.manual_seed(1)
    outputs = []
    for _ in range(K):
        with bnn.draw(), torch.no_grad():
            outputs.append(bnn.module(**tokens).logits)
    torch.testing.assert_close(prediction.mean, torch.stack(outputs).softmax(-1).mean(0), rtol=1e-6, atol=1e-7)


def test_a_cache_that_is_given_gets_its_tokens_once_for_each_network(replays):
    transformers = pytest.importorskip("transformers")
    bnn = bnnify.convert(language_model("llama").eval(), select="lm_head")
    cache = transformers.DynamicCache()
    bnn.predict({"input_ids": torch.randint(50, (1, 3)), "past_key_values": cache}, K, output="logits")
    assert cache.get_seq_length() == 3 * K
    assert not replays


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_every_network_runs_as_usual(dtype):
    with torch.autocast("cpu", dtype):
        check(zoo.encoder, (torch.randn(2, 5, 8),), "layers.1")


def test_the_trunk_runs_once_for_each_batch_of_a_loader(replays, monkeypatch):
    monkeypatch.setattr("bnnify.prediction.loop.GROUP_BATCHES", 2)
    bnn = bnnify.convert(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), select="2")
    bnn.predict(DataLoader(torch.randn(10, 4), batch_size=2), K)
    assert len(replays) == 5 * (K - 1)


@pytest.mark.usefixtures("trusted")
def test_what_is_kept_of_trunks_has_a_limit(monkeypatch):
    monkeypatch.setattr(trunk, "LIMIT", 5 * 8 * 4 + 1)  # a little more than what one batch leaves in the head
    bnn = bnnify.convert(Network(), select="head")
    bnn.predict(DataLoader(torch.randn(15, 4), batch_size=5), K)
    assert len(CALLS) == 1 + 1 + K


# Code that nobody has published runs once for each network


def test_whoever_wrote_a_layer_has_it_run_for_each_network():
    assert check(Network, x()) == K


class Noisy(Network):
    def __init__(self, noise):
        super().__init__(between=lambda hidden: hidden * noise())


RNG = np.random.default_rng(0)
HIDDEN_NOISE = {
    "the generator of numpy": lambda: float(np.random.rand(8, 39)[0, 0]),
    "a generator of numpy of its own": lambda: float(RNG.normal()),
    "a generator of numpy made anew": lambda: float(np.random.default_rng().normal()),
    "a generator of torch made anew": lambda: float(torch.Generator().seed() % 1000),
    "the system": lambda: random.SystemRandom().random(),
    "bytes of the system": lambda: float(os.urandom(2)[0]),
    "the clock": lambda: time.perf_counter_ns() % 1e4,
}


def test_noise_that_torch_does_not_know_is_in_every_network():
    for name in HIDDEN_NOISE:
        bnn = bnnify.convert(Noisy(HIDDEN_NOISE[name]), select="head", posterior_std=1e-9)
        std = bnn.predict(x(), 8).std
        assert (std > 1e-4).all()


def test_noise_that_leaves_the_generators_as_they_were_is_in_every_network():
    def forked(hidden):
        with torch.random.fork_rng():
            return F.dropout(hidden, 0.5, True)

    assert check(lambda: Network(forked), x()) == K


def step(state):
    state[0] += 1
    return float(state[0])


STATE = {
    "an array of numpy": lambda: np.zeros(1),
    "a tensor through its data": lambda: torch.zeros(1).data,
    "a tensor as an array": lambda: torch.zeros(1).numpy(),
    "a list": lambda: [0],
    "a read-only view of a dictionary": lambda: types.MappingProxyType({"n": [0]})["n"],
}


@pytest.mark.parametrize("name", STATE)
def test_state_goes_on_from_network_to_network(name):
    state = STATE[name]()
    bnn, seen = bnnify.convert(Network(after=lambda o, h: o * 0 + step(state)), select="head"), []
    bnn.predict(x(), K, output=lambda o: seen.append(o[0, 0].item()) or o)
    assert seen == [1, 2, 3, 4]


@dataclass
class Output:
    logits: torch.Tensor
    past: list


class Growing(Network):
    """Appends to a list that it is given, as the cache of a language model does."""

    def forward(self, x, past):
        past.append(self.trunk(x))
        return Output(self.head(torch.cat(past).mean(0)), list(past))


def test_a_forward_that_changes_its_arguments_runs_once_for_each_network():
    assert check(Growing, (torch.randn(1, 4), [torch.zeros(1, 8)])) == K


class Scaled(nn.Linear):
    def forward(self, x):
        self.weight.mul_(0.5)  # of the draw's sample
        return super().forward(x)


def test_a_sample_that_the_forward_changes_is_changed_once():
    def build():
        model = Network(after=lambda o, h: o * float(o.mean()))
        model.head = Scaled(8, 3)
        return model

    assert check(build, x()) == K


def test_what_a_model_keeps_is_a_tensor_like_any_other():
    class Keeping(Network):
        def __init__(self):
            super().__init__()
            self.all = []

        def forward(self, x):
            self.all.append(super().forward(x))
            return self.all[-1]

    bnn = bnnify.convert(Keeping(), select="head")
    outputs = predicted(bnn, x())
    assert [type(kept) for kept in bnn.module.all] == [torch.Tensor] * K
    assert all(map(torch.equal, bnn.module.all, outputs))


# What is taken for published code


def published():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def test_layers_of_torch_are_known_also_when_they_are_bayesian():
    assert is_known(published())
    assert is_known(bnnify.convert(published()).module)


def with_hook(model):
    model[0].register_forward_hook(lambda *_: None)


def with_own_forward(model):
    model[1].forward = lambda x: x * random.random()


def with_subclass(model):
    model[0] = Counted(4, 8).eval()


def with_own_function(model):
    model[1] = nn.TransformerEncoderLayer(4, 2, 8, activation=lambda x: x * random.random()).eval()


def with_foreign_state(model):
    model[1].state = np.zeros(1)


def with_training(model):
    model.append(nn.Dropout())


def with_compiled_part(model):
    model[0].compile(backend="eager")


def with_decorated_method(model):
    @functools.wraps(nn.ReLU.forward)
    def noisy(self, x):
        return x * random.random()

    model[1].__class__ = type("ReLU", (nn.ReLU,), {"forward": noisy, "__module__": nn.ReLU.__module__})


def with_partial_method(model):
    methods = {"forward": functools.partialmethod(lambda self, x: x), "__module__": nn.ReLU.__module__}
    model[1].__class__ = type("ReLU", (nn.ReLU,), methods)


def with_function_in_an_object(model):
    model[1].activation = pytest.importorskip("torchvision").transforms.Lambda(lambda x: x * random.random())


def with_module_beside_its_children(model):
    object.__setattr__(model[1], "activation", Counted(8, 8))


def with_observer(model):
    model.insert(1, torch.ao.quantization.RecordingObserver())


UNKNOWN = [
    with_decorated_method,
    with_partial_method,
    with_function_in_an_object,
    with_module_beside_its_children,
    with_observer,
    with_hook,
    with_own_forward,
    with_subclass,
    with_own_function,
    with_foreign_state,
    with_training,
    with_compiled_part,
]


def test_what_somebody_has_changed_is_not_known():
    for change in UNKNOWN:
        model = published()
        change(model)
        assert not is_known(model)


def test_a_method_that_somebody_has_replaced_is_not_known(monkeypatch):
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: x * random.random())
    assert not is_known(published())


@pytest.mark.parametrize("where", [F, torch])
def test_a_function_of_torch_that_somebody_has_replaced_makes_all_layers_unknown(where, monkeypatch):
    monkeypatch.setattr(where, "relu", lambda x, inplace=False: x * random.random())
    assert not is_known(published())


def test_an_attention_function_of_ones_own_is_not_known(monkeypatch):
    transformers = pytest.importorskip("transformers")
    model = language_model("llama").eval()
    assert is_known(model)
    attention = transformers.AttentionInterface()
    monkeypatch.setitem(attention._global_mapping, "of_my_own", lambda *args, **kwargs: None)
    assert not is_known(model)


def test_a_layer_that_keeps_something_from_batch_to_batch_runs_each_time(replays):
    """Rotary embeddings that are stretched for long inputs, and stay so for the next ones."""
    transformers = pytest.importorskip("transformers")
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, intermediate_size=16, max_position_embeddings=16, rope_parameters=rope)
    bnn = bnnify.convert(transformers.LlamaForCausalLM(config).eval(), select="lm_head")
    bnn.predict(iter([{"input_ids": torch.randint(50, (1, n))} for n in (8, 40)]), K, output=lambda o: o.logits[:, 0])
    assert not replays


@pytest.mark.parametrize("make", [torch.fx.symbolic_trace, lambda m: torch.export.export(m, x()).module()])
def test_a_graph_runs_each_time(make, replays):
    bnn = bnnify.convert(make(published()), select="2*")
    assert bnn.predict(x(), K).mean.shape == (5, 3)
    assert not replays


def test_a_layer_in_a_file_with_other_random_numbers_is_not_known(monkeypatch):
    monkeypatch.setattr(torch.nn.modules.activation, "luck", random, raising=False)
    assert not is_known(published())


def test_hooks_are_called_for_each_network():
    bnn = bnnify.convert(published(), select="2")
    seen = []
    bnn.module[0].register_forward_hook(lambda *_: seen.append(None))
    bnn.predict(x(), K)
    assert len(seen) == K


def test_other_modes_see_every_forward():
    class Products(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen += func is torch.ops.aten.addmm.default
            return func(*args, **(kwargs or {}))

    bnn = bnnify.convert(published(), select="2")
    with Products() as products:
        bnn.predict(x(), K)
    assert products.seen == 2 * K


# What operations show


class TiedHead(Network):
    def __init__(self):
        super().__init__()
        self.again = nn.Linear(8, 3)
        self.again.weight = self.head.weight

    def forward(self, x):
        return self.again(super().forward(x) @ self.head.weight)


ONCE = {
    "a tied weight": TiedHead,
    "in place": lambda: Network(lambda h: h.relu_(), lambda o, h: o.relu_().add_(1)),
    "a view in place": lambda: Network(after=lambda o, h: o[:, 0].mul_(2) + o.sum(1)),
    "both": lambda: Network(after=lambda o, h: {"sum": [o + h[:, :3], h]}),
    "lists of tensors": lambda: Network(after=lambda o, h: torch.cat([o, h, o], 1).split([4, 10], 1)),
    "a number of the trunk": lambda: Network(lambda h: h * h.sum().item() if h.sum() < 1e9 else h),
    "a decision that all samples share": lambda: Network(after=lambda o, h: o if o.isfinite().all() else h),
    "the shape": lambda: Network(after=lambda o, h: o * len(o) / o.shape[1]),
    "a new tensor in place": lambda: Network(lambda h: torch.zeros_like(h).add_(h)),
}


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("name", ONCE)
def test_the_trunk_runs_once(name):
    assert check(ONCE[name], x()) == 1


class Buffered(Network):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.data += 1
        return super().forward(x) * self.calls


class Counting(Network):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


class Adapting(Network):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.between = self.normalise

    def normalise(self, hidden):
        F.batch_norm(hidden, self.norm.running_mean, self.norm.running_var, training=True)
        return self.norm(hidden)


class OwnGenerator(Network):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        output = super().forward(x)
        return output + torch.rand(3, generator=self.generator).to(output.dtype)


class ScaledHead(Network):
    def __init__(self):
        super().__init__()
        self.head = Scaled(8, 3)


def written_into(output, hidden):
    made = torch.zeros(5, 3)
    made[:, :] = output
    return made


def changed_after_use(output, hidden):
    return output + hidden.mul_(2)[:, :3]


EACH_TIME = {
    "dropout in the trunk": lambda: Network(lambda h: F.dropout(h, training=True)),
    "dropout in the head": lambda: Network(after=lambda o, h: F.dropout(o, training=True)),
    "a generator of its own": OwnGenerator,
    "a buffer": Buffered,
    "an attribute": Counting,
    "running statistics": Adapting,
    "the input": lambda: Network(before=lambda x: x.add_(1)),
    "the sample": ScaledHead,
    "written into": lambda: Network(after=written_into),
    "changed after use": lambda: Network(after=changed_after_use),
    "sparse": lambda: Network(after=lambda o, h: o.to_sparse().to_dense()),
    "a copy": lambda: Network(after=lambda o, h: copy.deepcopy(o)),
    "an object": lambda: Network(after=lambda o, h: Output(o, [])),
}


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("name", EACH_TIME)
def test_where_operations_show_a_change_the_forward_runs_each_time(name):
    assert check(EACH_TIME[name], x()) == K


@pytest.mark.usefixtures("trusted")
def test_what_another_thread_draws_meanwhile_is_its_own_matter():
    def meanwhile(hidden):
        with ThreadPoolExecutor() as threads:
            threads.submit(torch.rand, 1).result()
        return hidden

    bnnify.convert(Network(meanwhile), select="head").predict(x(), K)
    assert len(CALLS) == 1


@pytest.mark.usefixtures("trusted")
def test_shapes_and_numbers_that_differ_between_networks_are_seen_to_differ():
    """Each decision is that of its own sample."""
    for after in (
        lambda o, h: o * 2 if o[0, 0] > 0 else h,
        lambda o, h: (o[o.sin() > 0].sum() + o).unique()[:3],
        lambda o, h: o * o[0, 0].item(),
    ):
        check(lambda after=after: Network(after=after), x())


@pytest.mark.usefixtures("trusted")
def test_who_changes_an_output_changes_it_for_that_network_alone():
    bnn, outputs = bnnify.convert(Network(after=lambda o, h: (o, h)), select="head"), []

    def note(output):
        outputs.append(output[1].mul_(2).clone())
        return output[0]

    bnn.predict(x(), K, output=note)
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_an_error_of_the_model_is_the_models():
    def broken(output, hidden):
        raise KeyError("mine")

    bnn = bnnify.convert(Network(after=broken), select="head")
    with pytest.raises(KeyError, match="mine"):
        bnn.predict(x(), K)
