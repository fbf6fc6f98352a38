"""Outputs that cannot mean what `likelihood=` says, or that have no average, are refused with what to do instead."""

import dataclasses
import math
import weakref

import pytest
import torch
from torch import nn
from torch.distributions import Normal
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bnnify
from bnnify.prediction import running_means
from bnnify.prediction.averages import Averages
from bnnify.prediction.known_likelihoods import as_likelihood


class Returns(nn.Module):
    """A linear layer of four features, of whose output something is made."""

    def __init__(self, make):
        super().__init__()
        self.layer, self.make = nn.Linear(4, 4), make

    def forward(self, x):
        return self.make(self.layer(x))


def returning(make):
    return bnnify.convert(Returns(make), posterior_std=0.3)


X = torch.randn(6, 4)


def pixels(output):
    return output[..., None, None].expand(-1, -1, 3, 3)


WITHOUT_THAT_MEANING = [
    ("logits as probabilities", lambda o: o, "probabilities", {}, "values from -.*likelihood='logits'"),
    ("yes/no as probabilities", torch.sigmoid, "probabilities", {}, r"sum to one.*sums from [12].*binary_logits"),
    ("log probabilities", lambda o: o.log_softmax(-1), "probabilities", {}, "logarithms of probabilities"),
    ("one probability", lambda o: o[:, :1].sigmoid(), "probabilities", {}, "one probability for each yes/no question"),
    ("another dimension", lambda o: o.softmax(0), "probabilities", {}, "classes in another dimension class_dim="),
    ("probabilities as logits", lambda o: o.softmax(-1), "logits", {}, "softmax once more.*'probabilities'"),
    ("pixels' probabilities", lambda o: pixels(o).softmax(1), "logits", {"class_dim": 1}, "dimension 1 they sum to"),
    ("one logit", lambda o: o[:, :1], "logits", {}, r"shape \(6, 1\), there is 1.*likelihood='binary_logits'"),
    ("one logit, squeezed", lambda o: o[:, 0], "logits", {}, r"shape \(6,\), one number.*binary_logits.*class_dim=0"),
    ("one logit in front", lambda o: o[None, :, 0], "logits", {"class_dim": 0}, "binary_logits"),
    ("a number", torch.sum, "logits", {}, r"shape \(\), which has no dimension -1"),
    ("no such dimension", lambda o: o, "logits", {"class_dim": 2}, "no dimension 2 for classes"),
    ("images", pixels, "logits", {}, r"shape \(6, 4, 3, 3\).*class_dim=1 for \(N, C, H, W\)"),
    ("images of probabilities", lambda o: pixels(o).softmax(1), "probabilities", {}, "class_dim=1"),
    ("a log-variance", lambda o: (o[:, 0], -o[:, 1].abs()), "gaussian", {}, r"negative in places.*out\[1\].exp\(\)"),
    ("two shapes", lambda o: (o[:, :1], o[:, 1].exp()), "gaussian", {}, r"same shape; they have \(6, 1\) and \(6,\)"),
    ("NaN", lambda o: o * math.nan, "values", {}, r"\(mean\) is NaN or infinite in 24 of 24 places"),
    ("a row of NaN", lambda o: o.index_fill(0, torch.tensor(2), math.nan), "logits", {}, r"4 of 24.*first at \(2, 0\)"),
    ("infinity", lambda o: o / 0, "values", {}, r"nan_to_num\(\)"),
    ("NaN as probabilities", lambda o: o.softmax(-1) * math.nan, "probabilities", {}, r"\(mean\) is NaN"),
    ("NaN in a yes/no question", lambda o: o * math.nan, "binary_logits", {}, r"\(mean\) is NaN"),
    ("NaN as variance", lambda o: (o, o * math.nan), "gaussian", {}, r"\(aleatoric_std\) is NaN"),
]


@pytest.mark.parametrize(
    ("make", "likelihood", "options", "match"), [case[1:] for case in WITHOUT_THAT_MEANING],
    ids=[case[0] for case in WITHOUT_THAT_MEANING],
)  # fmt: skip
def test_an_output_that_cannot_mean_that_is_refused_with_what_to_do(make, likelihood, options, match):
    with pytest.raises(ValueError, match=match):
        returning(make).predict(X, 3, likelihood=likelihood, **options)


WITH_THAT_MEANING = {
    "language model": (lambda o: o[None], "logits", {}),
    "log probabilities": (lambda o: o.log_softmax(-1), "logits", {}),
    "a masked class": (lambda o: o.masked_fill(torch.arange(4) == 2, -math.inf), "logits", {}),
    "class_dim=1": (pixels, "logits", {"class_dim": 1}),
    "class_dim=-1": (pixels, "logits", {"class_dim": -1}),
    "classes first": (lambda o: o.T, "logits", {"class_dim": 0}),
    "pixels": (lambda o: pixels(o).softmax(1), "probabilities", {"class_dim": 1}),
    "bfloat16": (lambda o: o.softmax(-1).bfloat16(), "probabilities", {}),
    "a pair": (lambda o: (o, o.exp()), "gaussian", {}),
    "a function": (lambda o: o, lambda mean: Normal(mean, 0.1), {}),
    "one logit": (lambda o: o[:, 0], "binary_logits", {}),
    "numbers": (lambda o: o.sum(-1), "values", {}),
    "complex numbers": (torch.fft.fft, "values", {}),
    "nothing": (lambda o: o[:0], "probabilities", {}),
}


@pytest.mark.parametrize("name", WITH_THAT_MEANING)
def test_outputs_of_that_meaning_pass_and_have_the_same_averages_in_pieces(name, monkeypatch):
    make, likelihood, options = WITH_THAT_MEANING[name]
    bnn = returning(make)
    whole = bnn.predict(X, 3, likelihood=likelihood, seed=0, **options)
    assert whole.mean.isfinite().all()
    monkeypatch.setattr(running_means, "PIECE", 5)
    pieces = bnn.predict(X, 3, likelihood=likelihood, seed=0, **options)
    for field in dataclasses.fields(whole):
        torch.testing.assert_close(getattr(pieces, field.name), getattr(whole, field.name), rtol=1e-6, atol=1e-7)


class Alive(TorchDispatchMode):
    """Notes the most bytes of tensors that are alive at a time, of those that are made under it."""

    def __init__(self):
        super().__init__()
        self.most, self._made = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self._made += [weakref.ref(leaf) for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
        alive = [tensor.untyped_storage() for each in self._made if (tensor := each()) is not None]
        self.most = max(self.most, sum({storage.data_ptr(): storage.nbytes() for storage in alive}.values()))
        return found


@pytest.mark.parametrize("likelihood", ["values", "logits"])
def test_a_large_output_is_in_memory_three_times(likelihood, monkeypatch):
    monkeypatch.setattr(running_means, "PIECE", 2_000)
    bnn = bnnify.convert(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1_000)), select="0.*").eval()
    nbytes = 100 * 1_000 * 4
    with Alive() as alive:
        bnn.predict(torch.randn(1, 100, 4), 3, likelihood=likelihood)
    assert 2 * nbytes < alive.most < 3.3 * nbytes


def test_what_only_a_later_network_shows_is_found_in_the_average():
    averages = Averages(as_likelihood("gaussian"))
    averages.add((torch.zeros(2), torch.ones(2)))
    averages.add((torch.zeros(2), torch.tensor([1.0, -0.5])))
    assert averages.prediction().aleatoric_std.isnan().tolist() == [False, True]
    averages = Averages(as_likelihood("probabilities"))
    averages.add(torch.tensor([[0.5, 0.5]]))
    averages.add(torch.tensor([[0.9, 0.5]]))
    with pytest.raises(ValueError, match="sum to one"):
        averages.prediction()


def test_a_single_examples_classes_need_no_batch_dimension():
    prediction = returning(lambda o: o).predict(torch.randn(3, 4)[0], 3, likelihood="logits", class_dim=0)
    assert prediction.mean.sum() == pytest.approx(1)
    assert prediction.predictive_entropy.shape == ()


# Dtypes and layouts


@pytest.mark.parametrize(
    ("make", "likelihood", "match"),
    [
        (lambda o: o.argmax(-1, keepdim=True), "values", r"integers \(torch.int64\).*decide"),
        (lambda o: o.argmax(-1, keepdim=True), "probabilities", "real floating-point numbers.*int64.*decide"),
        (lambda o: o > 0, "logits", "likelihood='logits' needs real floating-point numbers.*bool"),
        (torch.fft.fft, "logits", "likelihood='logits' needs real floating-point numbers.*complex64"),
    ],
    ids=["decisions", "decisions as probabilities", "masks", "spectra"],
)
def test_numbers_of_another_kind_are_refused(make, likelihood, match):
    with pytest.raises(TypeError, match=match):
        returning(make).predict(X, 3, likelihood=likelihood)


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (lambda o: o > 0, torch.float32),  # of which the average is the share of networks that say yes
        (torch.fft.fft, torch.complex64),
        (lambda o: o.relu().to_sparse(), torch.float32),
        (lambda o: o.relu().to_sparse_csr(), torch.float32),
    ],
    ids=["yes and no", "complex numbers", "coo", "csr"],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_other_values_have_a_dense_mean_and_a_real_spread(make, dtype):
    bnn, outputs = returning(make), []
    prediction = bnn.predict(X, 8, output=lambda out: outputs.append(out.to_dense()) or out)
    samples = torch.stack(outputs).to(dtype)
    torch.testing.assert_close(prediction.mean, samples.mean(0))
    torch.testing.assert_close(prediction.std, samples.std(0))


# Shapes of several networks and of several batches


def test_outputs_whose_number_differs_between_networks_have_no_average():
    counts = iter([3, 1, 3])
    bnn = returning(lambda o: o[: next(counts)])
    with pytest.raises(ValueError, match=r"two networks.*\(3, 4\) and \(1, 4\).*bnn.draw\(\)"):
        bnn.predict(X, 3)


@pytest.mark.parametrize(
    ("make", "batches", "match"),
    [
        (torch.sum, X.split(2), "one number for each batch.*reduction='none'"),
        (lambda o: o.T, X.split(2), r"count the examples along dimension 1.*out.movedim\(1, 0\)"),
        (lambda o: o.T, X.split(4), r"shape \(4, 4\).*dimension 1.*out.movedim\(1, 0\)"),
        (lambda o: o[None], X.split(5), r"dimension 1.*out.movedim\(1, 0\)"),
        (lambda o: o[:, : len(o)], X.split([4, 2]), r"\(4, 4\) and \(2, 2\).*Pad inputs"),
    ],
    ids=["numbers", "transposed", "square at first", "a dimension in front", "several sizes"],
)
def test_results_of_batches_that_cannot_follow_each_other_are_refused(make, batches, match):
    with pytest.raises(ValueError, match=match):
        returning(make).predict(list(batches), 2)


def test_examples_along_another_dimension_are_put_in_front_as_the_error_says():
    bnn = returning(lambda o: o.T)
    torch.manual_seed(1)
    expected = bnn.predict(X, 3).mean
    torch.manual_seed(1)
    found = bnn.predict(list(X.split(2)), 3, output=lambda out: out.movedim(1, 0)).mean
    torch.testing.assert_close(found, expected.T)


def test_a_loader_may_give_rows_that_are_no_examples():
    rows = returning(lambda o: o.sum(0, keepdim=True)[:, :3])
    assert rows.predict(list(X.split(2)), 2).mean.shape == (3, 3)


@pytest.mark.parametrize("likelihood", ["logits", "probabilities", "gaussian"])
def test_where_values_are_not_at_hand_only_shapes_are_checked(likelihood):
    bnn = returning(
        {"logits": lambda o: o, "probabilities": lambda o: o.softmax(-1)}.get(likelihood, lambda o: (o, o.exp()))
    )
    predict = lambda x: bnn.predict(x, 2, likelihood=likelihood).mean  # noqa: E731
    found = torch.func.vmap(predict, randomness="same")(X[:, None])
    assert found.shape == (6, 1, 4)


# What is given and has no use


def test_the_dimension_of_classes_is_refused_where_there_are_none():
    bnn = returning(lambda o: o)
    with pytest.raises(ValueError, match=r"class_dim=1 is for likelihood='logits' and 'probabilities'.*'values'"):
        bnn.predict(X, 2, class_dim=1)
    with pytest.raises(TypeError, match="class_dim must be an integer, not the string '1'"):
        bnn.predict(X, 2, likelihood="logits", class_dim="1")


# The same meanings for what fits σ to data


@pytest.mark.parametrize(
    ("make", "likelihood", "match"),
    [
        (lambda o: o[:, :1], "logits", "binary_logits"),
        (lambda o: o[:, 0], "logits", "binary_logits"),
        (lambda o: o.softmax(-1), "logits", "softmax once more"),
        (pixels, "logits", "class_dim=1"),
        (lambda o: (o[:, 0], -o[:, 1].exp()), "gaussian", "negative in places"),
    ],
    ids=["one logit", "squeezed", "probabilities", "images", "log-variance"],
)
def test_the_fisher_information_is_that_of_outputs_with_that_meaning(make, likelihood, match):
    with pytest.raises(ValueError, match=match):
        bnnify.FisherStd.estimate(Returns(make), [X], num_data=6, likelihood=likelihood)


def test_a_function_that_makes_no_distribution_is_refused():
    for function in (lambda out: out, lambda out: Normal):
        with pytest.raises(TypeError, match=r"returns a torch.distributions.Distribution, not a"):
            bnnify.FisherStd.estimate(Returns(lambda o: o), [X], num_data=6, likelihood=function)


def test_the_fisher_information_of_an_output_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="NaN or infinite"):
        bnnify.FisherStd.estimate(Returns(lambda o: o * math.nan), [X], num_data=6, likelihood="logits")


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_inputs_without_an_example_in_each_row_have_no_fisher_information(chunk_size):
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x, weights):
            return self.layer(x * weights.sum())

    with pytest.raises(bnnify.ArgumentError, match=r"\[\(6, 4\), \(2,\)\] and \[\(6, 3\)\].*from_adam"):
        bnnify.FisherStd.estimate(
            Graph(), [((X, torch.ones(2)),)], num_data=6, chunk_size=chunk_size, likelihood="logits"
        )


def test_classes_of_pixels_are_where_class_dim_says():
    def estimated(make, class_dim):
        torch.manual_seed(1)
        return bnnify.FisherStd.estimate(
            Returns(make), [X], num_data=6, class_dim=class_dim, likelihood="logits"
        ).fisher

    torch.testing.assert_close(estimated(pixels, 1), estimated(lambda o: pixels(o).movedim(1, -1), -1))
    bnn = bnnify.convert(Returns(pixels))
    assert (
        bnnify.tune_std(bnn, [(X, torch.randint(4, (6, 3, 3)))], num_samples=2, class_dim=1, likelihood="logits").factor
        > 0
    )
