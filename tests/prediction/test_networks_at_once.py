"""Several networks in one forward: the networks of the plain loop, or an error that says why not."""

import pytest
import torch
from torch import nn

import bnnify
from bnnify.draws.outputs import tensors_in
from tests import zoo

K = 5

NOT_AT_ONCE = {"lstm": "aten::lstm", "gru": "aten::gru", "checkpointed_reentrant": "autograd.Function"}
"""What vmap says of the models that it cannot do."""


def predicted(bnn, inputs, **options):
    torch.manual_seed(1)
    return bnn.predict(inputs, K, output=lambda found: next(iter(tensors_in(found))), **options)


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:None of the inputs", "ignore:LSTM with")
@pytest.mark.parametrize("at_once", [2, K])  # five by twos: the last one is alone
@pytest.mark.parametrize("name", zoo.ZOO)
def test_they_are_the_networks_that_would_run_one_after_another(name, at_once):
    model, arguments = zoo.build(name)
    bnn = bnnify.convert(model, posterior_std=bnnify.Relative(0.3))
    expected = predicted(bnn, arguments)
    if name in NOT_AT_ONCE:
        with pytest.raises(bnnify.ArgumentError, match=f"{at_once} networks in one forward.*{NOT_AT_ONCE[name]}"):
            predicted(bnn, arguments, networks_at_once=at_once)
        return
    found = predicted(bnn, arguments, networks_at_once=at_once)
    tolerance = {"rtol": 0.05, "atol": 0.05} if name == "bfloat16" else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found.mean, expected.mean, **tolerance)
    torch.testing.assert_close(found.std, expected.std, **tolerance)


@pytest.mark.parametrize("antithetic", [False, True])
def test_every_batch_of_a_loader_sees_the_same_networks(antithetic, monkeypatch):
    monkeypatch.setattr("bnnify.prediction.loop.GROUP_BATCHES", 2)  # so that networks are drawn once more
    bnn = bnnify.convert(nn.Linear(4, 3).double(), posterior_std=0.5)
    batches = list(torch.randn(9, 4, dtype=torch.float64).split(3))
    found, expected = (predicted(bnn, batches, antithetic=antithetic, networks_at_once=n) for n in (3, 1))
    torch.testing.assert_close(found.mean, expected.mean)
    torch.testing.assert_close(found.std, expected.std)


def test_what_does_not_depend_on_the_weights_is_computed_once():
    rows = []

    class Trunk(nn.Linear):
        def forward(self, x):
            rows.append(x.shape)
            return super().forward(x)

    bnn = bnnify.convert(nn.Sequential(Trunk(4, 6), nn.Linear(6, 3)), select="1")
    bnn.predict(torch.randn(2, 4), K, networks_at_once=K)
    assert len(rows) == 1


class CountingInAnAttribute(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


class CountingInABuffer(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


@pytest.mark.parametrize("counting", [CountingInAnAttribute, CountingInABuffer])
def test_a_model_that_keeps_something_from_one_network_to_the_next_is_refused(counting):
    bnn = bnnify.convert(counting(4, 3), posterior_std=0.5)
    with pytest.raises(bnnify.ArgumentError, match="keeps something in the model"):
        bnn.predict(torch.randn(2, 4), K, networks_at_once=K)


@pytest.mark.parametrize("at_once", [0, 1.5, True])
def test_their_number_is_a_positive_integer(at_once):
    with pytest.raises(bnnify.ArgumentError, match="networks_at_once must be a positive integer"):
        bnnify.convert(nn.Linear(4, 3)).predict(torch.randn(2, 4), networks_at_once=at_once)
