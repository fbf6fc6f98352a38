"""The trunk is computed once per batch, and every output is that of the plain loop over draws, bit for bit."""

import copy
import random
import threading
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import bnnify
from bnnify import passes as passes_module
from bnnify.parameters import bayesian_parameters

K = 4
CALLS: list[None] = []  # of the first layer of the trunk; in no module, where predict would find it


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    random.seed(0)
    CALLS.clear()


class Counted(nn.Linear):
    def forward(self, x):
        CALLS.append(None)
        return super().forward(x)


class Network(nn.Module):
    """A trunk and a head, and what happens between and after them."""

    def __init__(self, between=lambda hidden: hidden, after=lambda output, hidden: output, before=lambda x: x):
        super().__init__()
        self.trunk = Counted(4, 8)
        self.head = nn.Linear(8, 3)
        self.before, self.between, self.after = before, between, after

    def forward(self, x):
        hidden = self.between(self.trunk(self.before(x)))
        return self.after(self.head(hidden), hidden)


def plain_loop(bnn, args):
    torch.manual_seed(1)
    random.seed(1)
    with torch.no_grad():
        outputs, args = [], copy.deepcopy(args)
        for _ in range(K):
            with bnnify.Draw(bayesian_parameters(bnn.module)):
                outputs.append(copy.deepcopy(bnn.module(*args)))
        return outputs


def predicted(bnn, args):
    """The outputs that ``predict`` averages."""
    torch.manual_seed(1)
    random.seed(1)
    outputs = []

    def note(output):
        outputs.append(copy.deepcopy(output))
        return zoo.tensors(output)[0]

    bnn.predict(tuple(copy.deepcopy(args)), K, output=note)
    return outputs


def check(build, args, select="head", calls=1):
    """``calls`` is how often the trunk may run."""
    bnn, other = (bnnify.convert(build(), select=select, inplace=True).eval() for _ in range(2))
    other.load_state_dict(bnn.state_dict())
    expected = plain_loop(bnn, args)
    CALLS.clear()
    found = predicted(other, args)
    assert len(CALLS) == calls
    for a, b in zip(found, expected, strict=True):
        assert type(a) is type(b)
        assert zoo.equal(a, b)
    for a, b in zip(other.state_dict().values(), bnn.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    return bnn, other


def x():
    return (torch.randn(5, 4),)


@pytest.fixture
def replays(monkeypatch):
    """The outputs for which Python did not run."""
    replayed = []
    replay = passes_module.Tape.replay

    def noting(tape, samples):
        output = replay(tape, samples)
        replayed.append(output)
        return output

    monkeypatch.setattr(passes_module.Tape, "replay", noting)
    return replayed


# Models of every kind


# Of which the last two Bayesian parameters leave a weight that is not needed again, and the output is no odd object.
WITH_TRUNK = {"conv2d", "transposed", "residual_block", "attention", "attention_kdim", "encoder", "transformer", "swin"}
WITH_TRUNK |= {"lstm", "unrolled", "partly_frozen", "subclass", "dict", "checkpointed", "checkpointed_reentrant"}


@pytest.mark.parametrize("name", zoo.ZOO)
@pytest.mark.parametrize("last", [1, 2])
def test_every_model_with_only_its_last_weights_bayesian(name, last, replays):
    model, inputs = zoo.build(name)
    names = [parameter.name for parameter in bayesian_parameters(bnnify.convert(model).module)]
    check(zoo.ZOO[name].build, inputs, select=names[-last:], calls=0)
    if last == 2:
        assert len(replays) == (K - 1 if name in WITH_TRUNK else 0)


@pytest.mark.parametrize("select", ["fc", ["layer4", "fc"], "layer2"])
def test_a_residual_network(select, replays):
    torchvision = pytest.importorskip("torchvision")
    check(lambda: torchvision.models.resnet18(num_classes=5), (torch.randn(2, 3, 32, 32),), select, calls=0)
    assert len(replays) == K - 1


@pytest.mark.parametrize("select", ["layers.1", "layers.1.self_attn", "layers.1.linear1.weight"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_last_layer_of_a_transformer_in_its_fast_path(select, masked, replays):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = zoo.encoder().layers

        def forward(self, x):
            mask = torch.zeros(x.shape[:2], dtype=torch.bool)
            mask[0, -1] = masked
            for layer in self.layers:
                x = layer(x, src_key_padding_mask=mask)
            return x

    check(Masked, (torch.randn(2, 5, 8),), select, calls=0)
    assert len(replays) == K - 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("model", "select", "shape"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)), "3", (2, 3, 6, 6)),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)), None, (2, 3, 6, 6)),
        (lambda: nn.Sequential(nn.Linear(4, 8), nn.Softmax(-1), nn.Linear(8, 8), nn.LayerNorm(8)), "2", (5, 4)),
        (zoo.encoder, "layers.1", (2, 5, 8)),
        (Network, "head", (5, 4)),
    ],
)
def test_autocast_casts_every_sample_anew(model, select, shape, dtype):
    with torch.autocast("cpu", dtype):
        check(model, (torch.randn(shape),), select, calls=1 if model is Network else 0)


def test_what_autocast_has_widened_stays_wide():
    def after(output, hidden):
        return torch.cdist(output, output, compute_mode="use_mm_for_euclid_dist")  # a product, which alone is narrowed

    with torch.autocast("cpu", torch.bfloat16):
        check(lambda: Network(after=after), x())


def test_autocast_that_the_model_enters_and_leaves_itself():
    def between(hidden):
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(hidden, torch.ones(8, 8))

    def after(output, hidden):
        with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
            return output.float() @ torch.ones(3, 3)

    with torch.autocast("cpu", torch.bfloat16):
        check(lambda: Network(between, after), x())


# What is safe


class TiedHead(Network):
    def __init__(self):
        super().__init__()
        self.again = nn.Linear(8, 3)
        self.again.weight = self.head.weight

    def forward(self, x):
        return self.again(super().forward(x) @ self.head.weight)


SAFE = {
    "a tied weight": TiedHead(),
    "in place": Network(lambda h: h.relu_(), lambda o, h: o.relu_().add_(1)),
    "a view in place": Network(after=lambda o, h: o[:, 0].mul_(2) + o.sum(1)),
    "both": Network(after=lambda o, h: {"sum": [o + h[:, :3], h]}),
    "lists of tensors": Network(after=lambda o, h: torch.cat([o, h, o], 1).split([4, 10], 1)),
    "a number of the trunk": Network(lambda h: h * h.sum().item() if h.sum() < 1e9 else h),
    "the trunk as an array": Network(lambda h: h + torch.from_numpy(h.numpy() * 2) + h.tolist()[0][0]),
    "a decision that all samples share": Network(after=lambda o, h: o if o.isfinite().all() else h),
    "the shape": Network(after=lambda o, h: o * len(o) / o.shape[1]),
    "a new tensor in place": Network(lambda h: torch.zeros_like(h).add_(h)),
    "its type": Network(after=lambda o, h: o * isinstance(o, torch.Tensor) * (1 + hasattr(o, "drawn"))),
    "a copy": Network(after=lambda o, h: copy.deepcopy(o)),
    "functions": Network(after=lambda o, h: torch.func.vmap(lambda row: row * 2)(o)),
    "a parameter": Network(after=lambda o, h: nn.Parameter(o, requires_grad=False).data),
}


@pytest.mark.parametrize("name", SAFE)
def test_the_trunk_runs_once(name):
    check(lambda: copy.deepcopy(SAFE[name]), x())


def test_the_trunk_runs_once_for_each_batch_of_a_loader(monkeypatch):
    monkeypatch.setattr(passes_module, "GROUP_BYTES", 1)
    bnn = bnnify.convert(Network(), select="head")
    bnn.predict(DataLoader(torch.randn(10, 4), batch_size=3), K)
    assert len(CALLS) == 4


def test_the_trunk_counts_for_the_memory_that_a_group_may_take(monkeypatch):
    read = []

    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, index):
            read.append(index)
            return torch.ones(4)

    def reads_at_second_network(budget):
        monkeypatch.setattr(passes_module, "GROUP_BYTES", budget)
        read.clear()
        seen = []
        bnnify.convert(Network(), select="head").predict(
            DataLoader(Data()), 2, output=lambda output: seen.append(len(read)) or output
        )
        return seen

    inputs, trunk = 4 * 4, 8 * 4  # bytes of a batch
    # One batch is read ahead of the group: after two, and after three.
    assert reads_at_second_network(2 * (inputs + trunk)) == [1, 2, 3, 3, 3, 4, 5, 5, 5, 6, 6, 6]
    assert reads_at_second_network(2 * (inputs + trunk) + 1) == [1, 2, 3, 4, 4, 4, 4, 5, 6, 6, 6, 6]


# What is not


class Counting(Network):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


class Remembering(Network):
    def __init__(self):
        super().__init__()
        self.seen = {"means": []}

    def forward(self, x):
        self.seen["means"].append(None)
        return super().forward(x) * len(self.seen["means"])


class Buffered(Network):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


class BufferedUnseen(Buffered):
    def forward(self, x):
        self.calls.data += 1
        return super().forward(x)


class Replacing(Network):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x):
        self.scale.data = self.scale.data + 1
        return super().forward(x) * self.scale


class OutsideOfModules(Network):
    def __init__(self):
        super().__init__()
        self.states = [(torch.zeros(1),)]

    def forward(self, x):
        self.states[0][0].add_(1)
        return super().forward(x) * self.states[0][0]


class Adapting(Network):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.between = self.normalise

    def normalise(self, hidden):
        F.batch_norm(hidden, self.norm.running_mean, self.norm.running_var, training=True)
        return self.norm(hidden)


class Closure(Network):
    def __init__(self):
        calls = 0

        def between(hidden):
            nonlocal calls
            calls += 1
            return hidden * calls

        super().__init__(between)


class OwnGenerator(Network):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        return super().forward(x + torch.rand(4, generator=self.generator))


@dataclass
class Output:
    logits: torch.Tensor


def with_gradient(output, hidden):
    with torch.enable_grad():
        leaf = output.detach().requires_grad_()
        return torch.autograd.grad((leaf**2).sum(), leaf)[0]


def in_a_thread(output, hidden):
    done = []
    thread = threading.Thread(target=lambda: done.append(output * 2))
    thread.start()
    thread.join()
    return done[0]


def written_into(output, hidden):
    made = torch.zeros(5, 3)
    made[:, :] = output
    return made


def changed_after_use(output, hidden):
    return output + hidden.mul_(2)[:, :3]


def chosen_rows(output, hidden):
    return (output[output.sin() > 0].sum() + output).unique()[:3]


UNSAFE = {
    "dropout in the trunk": lambda: Network(lambda h: F.dropout(h, training=True)),
    "dropout in the head": lambda: Network(after=lambda o, h: F.dropout(o, training=True)),
    "luck of Python": lambda: Network(lambda h: h * random.random()),
    "a generator of its own": OwnGenerator,
    "a counter": Counting,
    "a list": Remembering,
    "a closure": Closure,
    "a buffer": Buffered,
    "the data of a buffer": BufferedUnseen,
    "the data of a parameter": Replacing,
    "a tensor in a list": OutsideOfModules,
    "running statistics": Adapting,
    "the input": lambda: Network(before=lambda x: x.add_(1)),
    "written into": lambda: Network(after=written_into),
    "changed after use": lambda: Network(after=changed_after_use),
    "an array after luck": lambda: Network(after=lambda o, h: torch.from_numpy(F.dropout(o, training=True).numpy())),
    "an array": lambda: Network(after=lambda o, h: torch.from_numpy(o.numpy() * 2)),
    "a list of numbers": lambda: Network(after=lambda o, h: h * o.tolist()[0][0]),
    "its address": lambda: Network(after=lambda o, h: o + (o.data_ptr() == 0)),
    "gradients": lambda: Network(after=with_gradient),
    "threads": lambda: Network(after=in_a_thread),
    "a dataclass": lambda: Network(after=lambda o, h: Output(o)),
    "shapes": lambda: Network(after=chosen_rows),
    "sparse": lambda: Network(after=lambda o, h: o.to_sparse().to_dense()),
}


# The first forward is given up, and done again.
ONCE_MORE = {"an array", "an array after luck", "a list of numbers", "its address", "gradients", "a dataclass"}


@pytest.mark.parametrize("name", UNSAFE)
def test_where_it_cannot_be_proved_the_loop_is_run(name):
    check(UNSAFE[name], x(), calls=K + (name in ONCE_MORE))


def test_numbers_that_differ_between_samples_are_seen_to_differ():
    """Each decision is that of its own sample."""
    model = Network(after=lambda o, h: o * 2 if o[0, 0] > 0 else h)
    bnn = bnnify.convert(model, select="head", posterior_std=3.0)
    expected = plain_loop(bnn, inputs := x())
    assert len({output.shape for output in expected}) == 2
    outputs = []
    torch.manual_seed(1)
    bnn.predict(inputs, K, output=lambda output: outputs.append(output) or torch.zeros(()))
    assert all(map(torch.equal, outputs, expected))


def test_hooks_are_called_for_each_sample():
    bnn = bnnify.convert(Network(), select="head")
    seen = []
    bnn.module.trunk.register_forward_hook(lambda *_: seen.append(None))
    bnn.predict(x(), K)
    assert len(seen) == K
    with bnn.draw():
        bnn.predict(x(), K)
    assert len(seen) == 2 * K


def test_who_changes_an_output_changes_it_for_that_sample_alone():
    model = Network(after=lambda o, h: (o, h))
    bnn = bnnify.convert(model, select="head")
    outputs = []

    def note(output):
        outputs.append(output[1].mul_(2).clone())
        return output[0]

    bnn.predict(x(), K, output=note)
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_other_modes_see_every_forward():
    class Products(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen += func is torch.ops.aten.addmm.default
            return func(*args, **(kwargs or {}))

    bnn = bnnify.convert(Network(), select="head")
    with Products() as products:
        bnn.predict(x(), K)
    assert products.seen == 2 * K
    CALLS.clear()
    with torch.inference_mode():
        bnn.predict(x(), K)
    assert len(CALLS) == K


def test_an_error_of_the_model_is_the_models():
    def broken(output, hidden):
        raise KeyError("mine")

    bnn = bnnify.convert(Network(after=broken), select="head")
    with pytest.raises(KeyError, match="mine"):
        bnn.predict(x(), K)


def test_what_a_model_keeps_of_a_sample_can_be_used_later():
    class Keeping(Network):
        def __init__(self):
            super().__init__()
            self.all = []

        def forward(self, x):
            self.last = super().forward(x)
            self.all.append(self.last)
            return self.last

    bnn = bnnify.convert(Keeping(), select="head")
    outputs = predicted(bnn, x())
    assert torch.equal(bnn.module.last, outputs[-1])
    assert len(bnn.module.all) == K
    for kept, output in zip(bnn.module.all, outputs, strict=True):
        assert torch.equal(kept * 2, output * 2)
        assert type(kept * 2) is torch.Tensor
