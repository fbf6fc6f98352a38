"""The predictive distribution: against stored samples, in eval mode, leaving nothing behind, in constant memory."""

import gc
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bnnify
from bnnify import Draw
from bnnify.modules.parameters import bayesian_parameters
from bnnify.prediction.sampler import Sampler

K = 7


class Network(nn.Module):
    """A network whose mode matters: dropout and batch norm; and whose output can be wrapped into any structure."""

    def __init__(self, wrap=lambda logits: logits, classes=5):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(8, classes)
        self.wrap = wrap

    def forward(self, x, shift=0.0):
        return self.wrap(self.head(self.body(x)) + shift)


def converted(*args, **kwargs):
    return bnnify.convert(Network(*args, **kwargs).double(), posterior_std=bnnify.Relative(0.7))


def inputs(rows=6):
    return torch.randn(rows, 4, dtype=torch.float64)


def predicted(bnn, *args, seed=1, **kwargs):
    torch.manual_seed(seed)
    return bnn.predict(*args, **{"num_samples": K, "likelihood": "values", **kwargs})


def stored_samples(bnn, *args, num_samples=K, seed=1):
    """The outputs of the networks that ``predicted`` averages over, kept."""
    torch.manual_seed(seed)
    module = bnn.module
    flags = [child.training for child in module.modules()]
    module.eval()
    outputs = []
    with torch.no_grad():
        for _ in range(num_samples):
            with bnn.draw():
                outputs.append(module(*args))
    for child, flag in zip(module.modules(), flags, strict=True):
        child.training = flag
    return torch.stack(outputs)


def entropy(probabilities, dim):
    return -(probabilities * probabilities.log()).sum(dim)


# What is computed


def test_values_have_the_mean_and_std_of_the_samples():
    bnn, x = converted(), inputs()
    samples = stored_samples(bnn, x)
    prediction = predicted(bnn, x)
    torch.testing.assert_close(prediction.mean, samples.mean(0))
    torch.testing.assert_close(prediction.std, samples.std(0))
    assert prediction.num_samples == K
    assert torch.equal(prediction.epistemic_std, prediction.std)
    absent = (prediction.predictive_entropy, prediction.expected_entropy, prediction.mutual_information)
    assert (*absent, prediction.aleatoric_std, prediction.total_std) == (None, None, None, None, None)


@pytest.mark.parametrize("likelihood", ["logits", "probabilities"])
@pytest.mark.parametrize("class_dim", [-1, 1])
def test_uncertainties_of_a_classifier_are_those_of_the_stored_samples(likelihood, class_dim):
    def wrap(logits):  # pixels after the classes for class_dim=1, as in segmentation
        logits = logits.unflatten(-1, (5, 2)) if class_dim == 1 else logits
        return logits.softmax(class_dim) if likelihood == "probabilities" else logits

    bnn, x = converted(wrap, classes=10 if class_dim == 1 else 5), inputs()
    samples = stored_samples(bnn, x)
    probabilities = samples if likelihood == "probabilities" else samples.softmax(class_dim if class_dim < 0 else 2)
    prediction = predicted(bnn, x, likelihood=likelihood, class_dim=class_dim)
    total = entropy(probabilities.mean(0), class_dim)
    expected = torch.stack([entropy(sample, class_dim) for sample in probabilities]).mean(0)
    torch.testing.assert_close(prediction.mean, probabilities.mean(0))
    torch.testing.assert_close(prediction.std, probabilities.std(0))
    torch.testing.assert_close(prediction.predictive_entropy, total)
    torch.testing.assert_close(prediction.expected_entropy, expected)
    torch.testing.assert_close(prediction.mutual_information, total - expected)
    assert prediction.mutual_information.shape == ((6, 2) if class_dim == 1 else (6,))
    assert (prediction.mutual_information > 0).all()


def test_uncertainties_of_yes_no_questions_are_those_of_bernoullis():
    bnn, x = converted(), inputs()
    yes = stored_samples(bnn, x).sigmoid()
    both = torch.stack([yes, 1 - yes], -1)
    prediction = predicted(bnn, x, likelihood="binary_logits")
    torch.testing.assert_close(prediction.mean, yes.mean(0))
    torch.testing.assert_close(prediction.predictive_entropy, entropy(both.mean(0), -1))
    torch.testing.assert_close(prediction.expected_entropy, entropy(both, -1).mean(0))


def test_regression_obeys_the_law_of_total_variance():
    bnn, x = converted(), inputs()
    outputs = stored_samples(bnn, x)
    means, variances = outputs[..., 0], outputs[..., 1].exp()
    bnn.module.wrap = lambda outputs: (outputs[:, 0], outputs[:, 1].exp())
    prediction = predicted(bnn, x, likelihood="gaussian")
    torch.testing.assert_close(prediction.mean, means.mean(0))
    torch.testing.assert_close(prediction.epistemic_std, means.std(0))
    torch.testing.assert_close(prediction.aleatoric_std, variances.mean(0).sqrt())
    torch.testing.assert_close(prediction.total_std**2, means.var(0) + variances.mean(0))
    assert prediction.predictive_entropy is None


def test_certain_classes_have_finite_entropies():
    model = nn.Linear(1, 2, dtype=torch.float32)
    prediction = predicted(bnnify.convert(model, posterior_std=1e6), torch.ones(1, 1), likelihood="logits")
    assert prediction.predictive_entropy.isfinite().all()
    assert prediction.expected_entropy.item() == pytest.approx(0, abs=1e-6)


def test_one_sample_has_no_spread():
    prediction = predicted(converted(), inputs(), num_samples=1, likelihood="logits")
    assert (prediction.std == 0).all()
    assert (prediction.mutual_information == 0).all()


def test_half_precision_outputs_are_averaged_in_float32():
    dtype = torch.bfloat16
    bnn = bnnify.convert(nn.Linear(4, 3, dtype=dtype))
    x = torch.randn(2, 4, dtype=dtype)
    samples = stored_samples(bnn, x, num_samples=300).float()
    prediction = predicted(bnn, x, num_samples=300)
    assert prediction.mean.dtype == torch.float32
    torch.testing.assert_close(prediction.mean, samples.mean(0))
    torch.testing.assert_close(prediction.std, samples.std(0))


def test_a_large_common_offset_does_not_cancel_the_spread():
    bnn = bnnify.convert(nn.Linear(4, 3))
    x = torch.randn(2, 4)
    shifted = bnnify.convert(nn.Linear(4, 3))
    shifted.module.load_state_dict(bnn.module.state_dict())
    with torch.no_grad():
        shifted.module.bias += 1e4
    torch.testing.assert_close(predicted(shifted, x).std, predicted(bnn, x).std, rtol=0.05, atol=1e-3)


# Modes, gradients, and what is left behind


def mixed_modes(bnn):
    """Flags such as fine-tuning with frozen batch norm has them."""
    bnn.train()
    bnn.module.body[1].eval()
    bnn.module.head.training = False
    bnn.training = False
    return [module.training for module in bnn.modules()]


class Broken(Exception):
    pass


def break_after(calls):
    def wrap(logits):
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise Broken
        return logits

    return wrap


@pytest.mark.parametrize("calls", [100, 0, 3])
def test_every_modules_own_flag_is_restored_also_after_an_exception(calls):
    bnn = converted(break_after(calls))
    before = mixed_modes(bnn)
    try:
        predicted(bnn, inputs())
    except Broken:
        assert calls < K
    assert [module.training for module in bnn.modules()] == before
    assert torch.is_grad_enabled()


def test_a_layer_that_merges_its_weights_in_eval_mode_is_as_uncertain_as_in_train_mode():
    class Lora(nn.Linear):
        def __init__(self):
            super().__init__(4, 3)
            self.weight.requires_grad = False
            self.lora_a, self.lora_b = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(3, 2))
            self.merged = False

        def train(self, mode=True):
            super().train(mode)
            if mode == self.merged:
                self.weight.data += (-1 if mode else 1) * (self.lora_b @ self.lora_a)
                self.merged = not mode
            return self

        def forward(self, x):
            output = super().forward(x)
            return output if self.merged else output + x @ self.lora_a.T @ self.lora_b.T

    bnn, x = bnnify.convert(nn.Sequential(Lora()).double(), select="*.lora_*", posterior_std=1.0), inputs()
    expected = predicted(bnn, x).std
    assert not bnn.module[0].merged
    bnn.eval()
    weight = bnn.module[0].weight.clone()
    torch.testing.assert_close(predicted(bnn, x).std, expected)
    assert bnn.module[0].merged
    torch.testing.assert_close(bnn.module[0].weight, weight)


def test_predictions_in_threads_are_all_in_eval_mode_and_the_last_restores_the_flags():
    seen, both_run = [], threading.Barrier(2, timeout=30)

    class Spy(nn.Dropout):
        def forward(self, x):
            seen.append(self.training)
            return super().forward(x)

    bnn = bnnify.convert(nn.Sequential(nn.Linear(4, 4), Spy()).double()).train()

    def run(num_samples):
        waited = []
        bnn.predict(inputs(), num_samples, output=lambda o: (waited or waited.append(both_run.wait()), o)[1])

    with ThreadPoolExecutor() as threads:
        list(threads.map(run, (2, 50)))
    assert seen == [False] * 52
    assert all(module.training for module in bnn.modules())


def test_a_shared_module_keeps_its_own_flag_whatever_its_parents_have():
    shared = nn.Linear(4, 4)
    bnn = bnnify.convert(nn.Sequential(nn.Sequential(shared), nn.Sequential(shared)), inplace=True)
    bnn.module[1].eval()
    shared.train()
    before = [module.training for module in bnn.modules()]
    bnn.predict(torch.randn(3, 4), num_samples=2)
    assert [module.training for module in bnn.modules()] == before


def test_no_draw_is_left_in_effect_after_an_exception_in_the_callers_function():
    def raise_(output):
        raise Broken

    bnn, x = converted().eval(), inputs()
    with pytest.raises(Broken) as error:
        bnn.predict(x, output=raise_)
    assert error.tb is not None  # which holds what was in progress
    assert torch.equal(bnn.module(x), bnnify.collapse(bnn)(x))


def test_prediction_is_in_eval_mode_and_without_gradient():
    seen = []
    bnn = converted()
    bnn.train()
    bnn.module.register_forward_hook(
        lambda module, args, output: seen.append(
            (any(child.training for child in module.modules()), torch.is_grad_enabled(), output.requires_grad)
        )
    )
    statistics = bnn.module.body[1].running_mean.clone()
    prediction = bnn.predict(inputs(), num_samples=3, likelihood="logits")
    assert seen == [(False, False, False)] * 3
    assert torch.equal(bnn.module.body[1].running_mean, statistics)
    assert not prediction.mean.requires_grad


def test_prediction_inside_a_draw_still_averages_over_networks_and_keeps_the_draw():
    bnn, x = converted().eval(), inputs()
    with bnn.draw():
        before = bnn.module(x)
        assert (bnn.predict(x, num_samples=5).std > 0).all()
        assert torch.equal(bnn.module(x), before)


@pytest.mark.parametrize("likelihood", ["values", "logits"])
def test_memory_does_not_grow_with_the_number_of_samples(likelihood):
    def most_alive(num_samples):
        bnn, alive = converted(), []

        def count(module, args, output):
            alive.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))

        bnn.module.register_forward_hook(count)
        gc.collect()
        bnn.predict(inputs(), num_samples=num_samples, likelihood=likelihood)
        assert len(alive) == num_samples
        return max(alive) - alive[0]

    assert most_alive(12) == most_alive(4)


# What goes in


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [x, torch.zeros(len(x))]], ids=["tensors", "with labels"])
def test_a_loader_gives_its_batches_in_order(wrap):
    likelihood = "logits"
    bnn, x = converted(), inputs(7)
    # A generator of its own, because starting to iterate takes a number from the global one.
    data = list(zip(x, torch.zeros(7), strict=True)) if isinstance(wrap(x), list) else list(x)
    loaded = predicted(bnn, DataLoader(data, batch_size=3, generator=torch.Generator()), likelihood=likelihood)
    batches = [predicted(bnn, batch, likelihood=likelihood) for batch in x.split(3)]  # by the same networks
    for name in ("mean", "std", "predictive_entropy", "expected_entropy", "mutual_information", "aleatoric_std"):
        parts = [getattr(batch, name) for batch in batches]
        found = getattr(loaded, name)
        assert found is None if parts[0] is None else torch.equal(found, torch.cat(parts))
    assert loaded.num_samples == K


def test_a_loader_without_batches_is_refused():
    with pytest.raises(ValueError, match="loader without batches"):
        converted().predict(DataLoader([]))


# Loaders: the same networks for every batch, and every batch read once


class Noted(nn.Module):
    """Passes on its input, and keeps the weight with which each forward began."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        NOTED.append((self.layer.weight.clone(), x))
        return self.layer(x)


NOTED: list[tuple[torch.Tensor, torch.Tensor]] = []


@pytest.fixture(params=[256, 1, 2], ids=["one group", "a batch a group", "groups"])
def groups(request, monkeypatch):
    monkeypatch.setattr("bnnify.prediction.loop.GROUP_BATCHES", request.param)


def loop_over_draws(bnn, loader, antithetic=False):
    """The outputs of all networks for all the data, by the plainest loop there is."""
    torch.manual_seed(1)
    batches, outputs = list(loader), []
    sampler = Sampler(bnn.module, antithetic=antithetic)
    with torch.no_grad():
        for k in range(K):
            draw = sampler.draw(k) if antithetic else Draw(bayesian_parameters(bnn.module))
            with draw:
                outputs.append(torch.cat([bnn.module(batch) for batch in batches]))
            del draw
    return torch.stack(outputs)


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("select", [None, "head"])
def test_the_outputs_for_a_loader_are_those_of_the_plain_loop_bit_for_bit(select, antithetic):
    bnn = bnnify.convert(Network().double(), select=select).eval()
    loader, outputs = DataLoader(inputs(14), batch_size=3, shuffle=True), []
    expected = loop_over_draws(bnn, loader, antithetic)
    state = torch.get_rng_state()
    found = predicted(bnn, loader, output=lambda output: outputs.append(output) or output, antithetic=antithetic)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.cat(outputs), expected.flatten(0, 1))
    torch.testing.assert_close(found.std, expected.std(0), rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("groups")
@pytest.mark.parametrize("antithetic", [False, True])
def test_the_seed_decides_which_networks_all_groups_see(antithetic):
    bnn, loader = converted(), DataLoader(inputs(14), batch_size=3, generator=torch.Generator())
    first, second = (predicted(bnn, loader, antithetic=antithetic).mean for _ in range(2))
    assert torch.equal(first, second)
    torch.manual_seed(2)
    assert not torch.equal(bnn.predict(loader, K, antithetic=antithetic).mean, first)


@pytest.mark.usefixtures("groups")
def test_the_random_numbers_of_others_are_never_drawn_twice():
    """As in another thread, which draws while a prediction is under way."""
    others = []
    bnn = bnnify.convert(Noted().double())
    bnn.module.register_forward_hook(lambda *_: others.append(torch.rand(1).item()))
    bnn.predict(DataLoader(inputs(14), batch_size=2), K)
    bnn.predict(DataLoader(inputs(14), batch_size=2), K)
    assert len(set(others)) == len(others) == 2 * 7 * K


@pytest.mark.parametrize("buffers", [1, 2])
def test_batches_that_share_their_memory_are_refused(buffers):
    memory = [torch.zeros(2, 4, dtype=torch.float64) for _ in range(buffers)]
    batches = (memory[number % buffers].fill_(number) for number in range(5))
    with pytest.raises(ValueError, match="reuses their memory"):
        converted().predict(batches, K)


def test_a_group_holds_no_more_batches_than_its_limits_say(monkeypatch):
    class Graph:  # a batch class of somebody's own
        def __init__(self, x):
            self.x = x

    class Head(nn.Linear):
        def forward(self, batch):
            return super().forward(batch.x)

    def most_alive(limit, value):
        monkeypatch.setattr(f"bnnify.prediction.loop.{limit}", value)
        alive, most = weakref.WeakSet(), []

        def collate(rows):
            batch = Graph(torch.stack(rows))
            alive.add(batch)
            most.append(len(alive))
            return batch

        bnnify.convert(Head(4, 2).double()).predict(DataLoader(inputs(20), batch_size=2, collate_fn=collate), 2)
        return max(most)

    batch = 2 * 4 * 8  # bytes
    assert most_alive("GROUP_BATCHES", 3) == 4  # and the one after them
    assert most_alive("GROUP_BYTES", 2 * batch) == 3


@pytest.mark.usefixtures("groups")
@pytest.mark.parametrize("antithetic", [False, True])
def test_every_batch_sees_the_same_networks_also_when_reading_and_forwards_are_random(antithetic):
    class Augmented(TensorDataset):
        def __getitem__(self, index):
            return self.tensors[0][index] + torch.rand(4)

    NOTED.clear()
    bnn = bnnify.convert(Noted())
    bnn.module.register_forward_hook(lambda module, args, output: output + torch.rand(1))
    loader = DataLoader(Augmented(torch.zeros(10, 4)), batch_size=2, shuffle=True)
    bnn.predict(loader, K, antithetic=antithetic)
    networks: dict[tuple[float, ...], list[torch.Tensor]] = {}
    for weight, x in NOTED:
        networks.setdefault(tuple(weight.flatten().tolist()), []).append(x)
    assert len(networks) == K
    first, *others = networks.values()
    assert len(first) == 5
    assert all(torch.equal(torch.cat(first), torch.cat(other)) for other in others)  # augmented once
    assert len(torch.cat(first).unique()) == 40


@pytest.mark.usefixtures("groups")
def test_a_loader_is_read_once_and_in_order():
    class Data(TensorDataset):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    read = []
    prediction = converted().predict(DataLoader(Data(inputs(7)), batch_size=2), K)
    assert read == list(range(7))
    assert len(prediction.mean) == 7


# Antithetic pairs


def test_the_mean_of_an_antithetic_pair_is_exact_for_a_linear_model():
    bnn, x = bnnify.convert(nn.Linear(4, 3, dtype=torch.float64), posterior_std=1.0), inputs()
    prediction = predicted(bnn, x, num_samples=2, antithetic=True)
    torch.testing.assert_close(prediction.mean, bnn.module(x).detach(), rtol=1e-12, atol=1e-12)
    assert (prediction.std > 0).all()


@pytest.mark.parametrize("num_samples", [2, 10])
def test_antithetic_spread_is_too_wide_by_what_is_documented(num_samples):
    bnn, x = bnnify.convert(nn.Linear(4, 200, dtype=torch.float64), posterior_std=1.0), inputs(1)
    variances = [
        torch.stack([predicted(bnn, x, seed=s, num_samples=num_samples, antithetic=a).std.square() for s in range(40)])
        for a in (False, True)
    ]
    correlation = -1  # of the outputs of a pair, if the model is linear
    expected = (num_samples - 1 - correlation) / (num_samples - 1)
    assert (variances[1].mean() / variances[0].mean()).item() == pytest.approx(expected, rel=0.1)


# The progress bar


class Bar:
    """Stands in for rich's, and notes what it was told."""

    made: list["Bar"] = []  # noqa: RUF012

    def __init__(self, *columns, **options):
        pass

    def __enter__(self):
        self.total, self.done = "not told", 0
        Bar.made.append(self)
        return self

    def __exit__(self, *exception):
        self.closed = True

    def add_task(self, description, total):
        self.total = total
        return "task"

    def advance(self, task):
        assert task == "task"
        self.done += 1


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(inputs(5))


@pytest.mark.parametrize(
    ("given", "total", "done"),
    [
        (lambda: inputs(), K, K),
        (lambda: DataLoader(inputs(7), batch_size=3), 3 * K, 3 * K),
        (lambda: DataLoader(Stream(), batch_size=2), None, 3 * K),
    ],
    ids=["batch", "loader", "stream"],
)
def test_the_progress_bar_counts_forwards(given, total, done, monkeypatch):
    progress = pytest.importorskip("rich.progress")
    monkeypatch.setattr(progress, "Progress", Bar)
    Bar.made.clear()
    converted().predict(given(), K)
    assert not Bar.made
    converted().predict(given(), K, progress=True)
    (bar,) = Bar.made
    assert (bar.total, bar.done, bar.closed) == (total, done, True)


def test_without_rich_the_progress_bar_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(ImportError, match=r"progress=True.*pip install rich"):
        converted().predict(inputs(), progress=True)
    converted().predict(inputs(), 2)


# What comes out


@dataclass
class Output:
    logits: torch.Tensor
    hidden: float = 0.0


@pytest.mark.parametrize(
    ("wrap", "output"),
    [
        (lambda logits: {"loss": 0.0, "logits": logits}, "logits"),
        (lambda logits: Output(logits), "logits"),
        (lambda logits: SimpleNamespace(logits=logits), "logits"),
        (lambda logits: (0.0, logits), 1),
        (lambda logits: [logits, 0.0], -2),
        (lambda logits: {"a": {"b": logits}}, lambda found: found["a"]["b"]),
        (lambda logits: logits - 1, lambda found: found + 1),
    ],
    ids=["key", "dataclass attribute", "attribute", "index", "negative index", "function", "function of a tensor"],
)
def test_the_caller_says_which_output(wrap, output):
    plain, structured = converted(), converted(wrap)
    structured.module.load_state_dict(plain.module.state_dict())
    x = inputs()
    expected = predicted(plain, x, likelihood="logits")
    torch.testing.assert_close(vars(predicted(structured, x, likelihood="logits", output=output)), vars(expected))


@pytest.mark.parametrize(
    ("wrap", "likelihood", "match"),
    [
        (
            lambda out: {"loss": 0.0, "logits": out},
            "logits",
            r"'logits'.* dict with the keys \['loss', 'logits'\].*output=",
        ),
        (lambda out: (out, out), "values", "returned tuple.*output=: a key, an attribute, an index, or a function"),
        (lambda out: out, "gaussian", r"pair of tensors \(mean, variance\), but got Tensor.*output="),
    ],
    ids=["mapping", "tuple", "no pair"],
)
def test_an_output_of_another_structure_needs_output(wrap, likelihood, match):
    with pytest.raises(TypeError, match=match):
        converted(wrap).predict(inputs(), likelihood=likelihood)


def test_an_unknown_likelihood_is_refused_with_those_known():
    with pytest.raises(ValueError, match=r"Unknown likelihood 'softmax': known are 'values', 'logits'.*'gaussian'"):
        converted().predict(inputs(), likelihood="softmax")
