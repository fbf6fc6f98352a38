"""One rule for data: what gives batches, what of a batch a model is called with, and what is refused."""

import dataclasses
from collections import UserDict, namedtuple
from types import MappingProxyType

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import bnnify
from bnnify.prediction.batches import as_arguments, batches_of, is_one_batch
from bnnify.prediction.devices import devices_of, placed


class Shifted(nn.Module):
    """A linear layer whose input may be shifted."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x, t=None):
        return self.layer(x if t is None else x + t)


X, T, Y = torch.randn(6, 4), torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
Pair = namedtuple("Pair", "x y")


class Batches:
    """Gives its items by number, and has no `__iter__`."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, number):
        return self.items[number]


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(X.split(4), Y.split(4), strict=True)


class Prefetching:
    """A loader of somebody's own, as timm and accelerate have them."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        yield from self.loader


def pairs():
    return list(zip(X.split(4), Y.split(4), strict=True))


GIVERS = {
    "list": pairs,
    "generator": lambda: (pair for pair in pairs()),
    "zip": lambda: zip(X.split(4), Y.split(4), strict=True),
    "loader": lambda: DataLoader(TensorDataset(X, Y), 4),
    "list of a loader": lambda: list(DataLoader(TensorDataset(X, Y), 4)),
    "loader of one's own": lambda: Prefetching(DataLoader(TensorDataset(X, Y), 4)),
    "batched stream": Stream,
    "by number": lambda: Batches(pairs()),
    "named tuples": lambda: [Pair(*pair) for pair in pairs()],
    "mappings with labels": lambda: [{"x": x, "labels": y} for x, y in pairs()],
    "other mappings": lambda: (UserDict(x=x, labels=y) for x, y in pairs()),
    "inputs that are tuples": lambda: [((x,), y) for x, y in pairs()],
    "inputs that are mappings": lambda: [[{"x": x}, y] for x, y in pairs()],
    "uneven and empty": lambda: iter([(X[:5], Y[:5]), (X[:0], Y[:0]), (X[5:], Y[5:])]),
}


@pytest.mark.parametrize("giver", GIVERS)
def test_whatever_gives_batches_does_so_for_predict_and_tune_std_and_the_fisher_information(giver):
    bnn = bnnify.convert(Shifted())

    def results(data):
        torch.manual_seed(1)
        prediction = bnn.predict(data(), 5, likelihood="logits")
        torch.manual_seed(1)
        fisher = bnnify.FisherStd.estimate(bnn.module, data(), num_data=6, likelihood=lambda out: Still(out))
        return (
            prediction,
            bnnify.tune_std(bnnify.convert(bnn.module), data(), num_samples=4, likelihood="logits").factor,
            fisher,
        )

    class Still(torch.distributions.Normal):
        def __init__(self, mean):
            super().__init__(mean, 1.0)

        def sample(self, sample_shape=()):
            return self.loc + 1

    prediction, factor, fisher = results(GIVERS[giver])
    expected, _, expected_fisher = results(lambda: [(X, Y)])
    assert prediction.mean.shape == (6, 3)
    assert factor > 0
    torch.testing.assert_close(fisher.fisher, expected_fisher.fisher)
    # Iterating over a DataLoader takes a random number, and with it come other networks.
    if "loader" not in giver:
        torch.testing.assert_close(prediction.mean, expected.mean)


def test_a_generator_is_read_once_and_as_it_goes():
    read = []
    bnn = bnnify.convert(Shifted())

    def batches():
        for x in X.split(2):
            read.append(len(x))
            yield x

    assert bnn.predict(batches(), 3).mean.shape == (6, 3)
    assert read == [2, 2, 2]


def test_a_tuple_as_inputs_is_the_arguments_and_what_else_a_batch_holds_is_not_passed_on():
    called = []
    bnn = bnnify.convert(Shifted())
    bnn.module.register_forward_hook(lambda module, args, output: called.append(args))
    bnn.predict([((X, T), Y)], 1)
    bnn.predict([(X, Y)], 1)
    bnn.predict([[X]], 1)
    assert [len(args) for args in called] == [2, 1, 1]
    assert torch.equal(called[0][1], T)


def test_labels_of_a_mapping_are_left_out_unless_the_mapping_is_said_to_be_the_inputs():
    batch = {"x": X, "labels": Y}
    module = Shifted()
    assert [set(kwargs) for _, kwargs in batches_of([batch], module)] == [{"x"}]
    assert [set(kwargs) for _, kwargs in batches_of([(batch,)], module)] == [{"x", "labels"}]
    assert [set(kwargs) for _, kwargs in batches_of(batch, module)] == [{"x", "labels"}]


def test_batches_of_transformers_are_mappings():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    bnn = bnnify.convert(transformers.BertForSequenceClassification(config))
    ids = torch.randint(1, 20, (6, 5))
    batches = [
        transformers.BatchEncoding({"input_ids": part, "attention_mask": torch.ones_like(part), "labels": y % 2})
        for part, y in zip(ids.split(3), Y.split(3), strict=True)
    ]
    seen = []
    bnn.module.register_forward_hook(lambda module, args, kwargs, output: seen.append(kwargs), with_kwargs=True)
    assert bnn.predict(batches, 2, likelihood="logits", output="logits").mean.shape == (6, 2)
    assert not any("labels" in kwargs for kwargs in seen)
    assert bnnify.tune_std(bnn, batches, num_samples=2, output="logits", likelihood="logits").factor > 0
    assert bnn.predict(batches[0], 2, output="logits").mean.shape == (3, 2)


@pytest.mark.parametrize("prepare", ["accelerate", "timm"])
def test_loaders_of_other_libraries_give_batches(prepare):
    loader = DataLoader(TensorDataset(X, Y), 4)
    if prepare == "accelerate":
        loader = pytest.importorskip("accelerate").Accelerator(cpu=True).prepare(loader)
    else:
        create_loader = pytest.importorskip("timm.data").create_loader
        images = TensorDataset(torch.randn(6, 3, 8, 8), Y)
        loader = create_loader(images, (3, 8, 8), 4, use_prefetcher=False, device=torch.device("cpu"), num_workers=0)
    bnn = bnnify.convert(nn.Sequential(nn.Flatten(), nn.Linear(4 if prepare == "accelerate" else 192, 3)))
    assert bnn.predict(loader, 2, likelihood="logits").mean.shape == (6, 3)
    assert bnnify.tune_std(bnn, loader, num_samples=2, likelihood="logits").factor > 0


@dataclasses.dataclass(frozen=True)
class Graph:
    x: torch.Tensor
    names: tuple[str, ...] = ()


class OfGraphs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, graph):
        return self.layer(graph.x)


def test_an_object_is_one_argument_alone_and_among_batches():
    bnn = bnnify.convert(OfGraphs())
    torch.manual_seed(1)
    one = bnn.predict(Graph(X), 3)
    torch.manual_seed(1)
    several = bnn.predict([Graph(part) for part in X.split(3)], 3)
    torch.testing.assert_close(one.mean, several.mean)


def test_a_packed_sequence_is_one_argument_although_it_is_a_tuple():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(4, 3, batch_first=True)

        def forward(self, sequence):
            assert isinstance(sequence, PackedSequence)
            return self.rnn(sequence)[1][0]

    bnn, packed = bnnify.convert(Reads()), pack_sequence([X, X[:3]])
    assert bnn.predict(packed, 2).mean.shape == (2, 3)
    assert bnn.predict([packed, packed], 2).mean.shape == (4, 3)


def test_text_is_one_argument():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 3)

        def forward(self, texts):
            return self.layer(torch.tensor([[float(len(text))] for text in texts]))

    bnn, texts = bnnify.convert(Counts()), ["aa", "bbb", "cccc", "ddddd"]
    assert bnn.predict(texts, 2).mean.shape == (4, 3)
    assert bnn.predict(DataLoader(texts, 2), 2).mean.shape == (4, 3)
    labelled = DataLoader(list(zip(texts, [0, 1, 2, 0], strict=True)), 2)
    assert bnn.predict(labelled, 2).mean.shape == (4, 3)
    assert bnnify.tune_std(bnn, labelled, num_samples=2, likelihood="logits").factor > 0


def test_what_is_one_batch_is_decided_by_its_type():
    packed, mapping = pack_sequence([X]), MappingProxyType({"x": X})
    one = [X, (X, T), {"x": X}, mapping, Graph(X), packed, "text", ["a", "b"], None, X.numpy()]
    several = [[X, X], [X, X[:2]], [X], [], [(X, Y)], [[X, Y]], [{"x": X}]]
    several += [iter([X]), Batches([X]), DataLoader(X), Stream()]
    assert all(map(is_one_batch, one))
    assert not any(map(is_one_batch, several))


def test_a_list_that_may_be_one_batch_is_refused_with_both_ways_out():
    for data in [
        [X, Y],
        [X, X[:, :1]],
        [X, {"labels": Y}],
        [X, [Y]],
        [X, 3],
        next(iter(DataLoader(TensorDataset(X, Y), 4))),
    ]:
        bnn = bnnify.convert(Shifted())
        match = r"looks like one batch.*batch\[0\].*\[batch\].*iter\(batches\)"
        with pytest.raises(TypeError, match=match):
            bnn.predict(data, 2)
        with pytest.raises(TypeError, match=match):
            bnnify.tune_std(bnn, data, likelihood="logits")
        with pytest.raises(TypeError, match=match):
            bnnify.FisherStd.estimate(bnn.module, data, num_data=6, likelihood="logits")


def test_batches_of_several_lengths_are_read_from_an_iterator():
    bnn = bnnify.convert(Pooled())
    assert bnn.predict(iter([X, X[:, :2]]), 2).mean.shape == (12, 3)


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 3)

    def forward(self, x):
        return self.layer(x.mean(1, keepdim=True))


def test_three_elements_do_not_tell_the_inputs():
    for batch in [(X, T, Y), [X, T, Y]]:
        bnn = bnnify.convert(Shifted())
        match = (
            r"batch of 3 .*shape \(6,\).*which of its elements are inputs.*\(\(\(x, t\), y\) for x, t, y in loader\)"
        )
        with pytest.raises(TypeError, match=match):
            bnn.predict([batch], 2)
        with pytest.raises(TypeError, match=match):
            bnnify.tune_std(bnn, [batch], likelihood="logits")
        with pytest.raises(TypeError, match=match):
            bnnify.FisherStd.estimate(bnn.module, [batch], num_data=6, likelihood="logits")


def test_single_examples_are_no_batches():
    with pytest.raises(TypeError, match=r"TensorDataset gives single examples.*DataLoader\(dataset"):
        bnnify.convert(Shifted()).predict(TensorDataset(X, Y), 2)


@pytest.mark.parametrize(
    ("data", "called"),
    [
        ((X, T, Y), r"\(a Tensor of shape \(6, 4\), a Tensor of shape \(6, 4\), a Tensor of shape \(6,\)\)"),
        ([{"x": X, "label": Y}], r"x=a Tensor of shape \(6, 4\), label=a Tensor of shape \(6,\)"),
        (X.numpy(), r"\(a ndarray\).*not numpy.ndarray"),
        ([Graph(X)], r"\(a Graph\).*must be Tensor, not"),
        (None, r"\(None\)"),
        ({0: X}, r"0=a Tensor.*strings"),
    ],
    ids=["too many", "another name", "array", "object", "nothing", "keys"],
)
def test_what_a_model_cannot_be_called_with_is_named_beside_the_rule(data, called):
    bnn = bnnify.convert(Shifted())
    with pytest.raises(
        TypeError, match=rf"Shifted, called with .*{called}.*What the model is called with: .*several inputs"
    ):
        bnn.predict(data, 2)


def test_where_batches_are_needed_one_batch_is_refused():
    for data in [(X, Y), X, {"input": X, "labels": Y}, None, 3]:
        bnn = bnnify.convert(nn.Linear(4, 3))
        with pytest.raises(TypeError, match=r"tune_std takes what gives batches.*\[\(inputs, target\)\]"):
            bnnify.tune_std(bnn, data, likelihood="logits")
        with pytest.raises(TypeError, match=r"FisherStd.estimate takes what gives batches.*\[\(inputs, target\)\]"):
            bnnify.FisherStd.estimate(bnn.module, data, num_data=6, likelihood="logits")


def test_tuning_needs_targets_and_says_how_to_make_pairs():
    for batch in [X, (X,), {"input": X}, Graph(X)]:
        with pytest.raises(
            ValueError, match=r"needs batches \(input, target\), or mappings with `labels`.*for batch in"
        ):
            bnnify.tune_std(bnnify.convert(nn.Linear(4, 3)), [batch], likelihood="logits")


# Devices. The device "meta" stands in for an accelerator, which a machine need not have.


class NotedMove:
    """Has a method `to` of its own, as graphs and encodings do."""

    device = torch.device("cpu")

    def to(self, device):
        moved = NotedMove()
        moved.device = torch.device(device)
        return moved


META = torch.device("meta")


def test_everything_nested_in_a_batch_is_moved():
    batch = {"a": [X, (X, "text")], "b": Graph(X, ("n",)), "c": NotedMove(), "d": Pair(X, 1)}
    moved = placed(batch, [META])
    assert (moved["a"][0].device, moved["a"][1][0].device, moved["a"][1][1]) == (META, META, "text")
    assert (moved["b"].x.device, moved["b"].names) == (META, ("n",))
    assert moved["c"].device == META
    assert (type(moved["d"]), moved["d"].x.device, moved["d"].y) == (Pair, META, 1)
    assert batch["b"].x.device.type == "cpu"


def test_a_batch_that_somebody_has_placed_stays_as_it_is():
    lengths = torch.tensor([3, 2])
    batch = (torch.empty(2, 3, device="meta"), lengths)
    assert placed(batch, [torch.device("cpu"), META])[1] is lengths
    assert placed((X, Y), [torch.device("cpu"), META])[0].device.type == "cpu"
    assert placed((X, Y), [META, torch.device("cpu")])[1].device == META


def test_a_model_without_parameters_or_with_some_on_the_meta_device_leaves_batches_where_they_are():
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused, self.used = nn.Linear(4, 3, device="meta"), nn.Linear(4, 3)

        def forward(self, x):
            return self.used(x)

    assert devices_of(nn.Identity()) == []
    assert set(devices_of(Split())) == {torch.device("cpu")}
    assert bnnify.BayesianModel(nn.Identity()).predict([X, X], 2).mean.shape == (12, 4)
    assert bnnify.convert(Split(), select="used").predict([X], 2).mean.shape == (6, 3)


def test_a_single_batch_is_not_touched():
    given = {"x": X, "t": [T]}
    _, kwargs = as_arguments(given)
    assert kwargs["t"] is given["t"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_of_the_cpu_go_to_the_model_on_the_gpu():
    bnn = bnnify.convert(Shifted()).cuda()
    assert bnn.predict([((X, T), Y)], 2, likelihood="logits").mean.is_cuda
    assert bnnify.tune_std(bnn, DataLoader(TensorDataset(X, Y), 4), num_samples=2, likelihood="logits").factor > 0
    assert (
        bnnify.FisherStd.estimate(bnn.module, [(X, Y)], num_data=6, likelihood="logits").fisher["layer.weight"].is_cuda
    )


# What predict is asked for of an output


def test_a_part_that_the_output_lacks_is_named_with_those_it_has():
    class Returns(Shifted):
        def forward(self, x):
            return {"logits": self.layer(x)}

    bnn = bnnify.convert(Returns())
    with pytest.raises(ValueError, match=r"output='logit' is no part.*a dict with the keys \['logits'\]"):
        bnn.predict(X, 2, output="logit")
    with pytest.raises(TypeError, match=r"output must be a key, an attribute, an index or a function, not 0\.5"):
        bnn.predict(X, 2, output=0.5)
    with pytest.raises(ValueError, match=r"output=0 of a single tensor would be one example.*out\[:, 0\]"):
        bnnify.convert(Shifted()).predict(X, 2, output=0)
