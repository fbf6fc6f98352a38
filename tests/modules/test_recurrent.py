"""Recurrent layers and cells: one sample of the weights for the whole sequence, whatever their options."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import bnnify
from tests.contract import Case, broken, drawn_network

pytestmark = [
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

STEPS, BATCH, FEATURES, HIDDEN = 4, 3, 2, 4

LAYERS = {
    "two layers": {"num_layers": 2},
    "bidirectional": {"bidirectional": True},
    "bidirectional, two layers, batch first": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "dropout": {"num_layers": 2, "dropout": 0.5},
    "no bias": {"bias": False},
}
MODELS = {
    f"{kind.__name__}, {name}": (kind, options)
    for kind in (nn.LSTM, nn.GRU, nn.RNN)
    for name, options in LAYERS.items()
} | {
    "LSTM, projected": (nn.LSTM, {"proj_size": 3}),
    "LSTM, projected, bidirectional, two layers": (nn.LSTM, {"proj_size": 3, "num_layers": 2, "bidirectional": True}),
    "RNN, relu": (nn.RNN, {"nonlinearity": "relu"}),
}
CELLS = {
    "LSTMCell": (nn.LSTMCell, {}),
    "GRUCell": (nn.GRUCell, {}),
    "RNNCell": (nn.RNNCell, {}),
    "RNNCell, relu, no bias": (nn.RNNCell, {"nonlinearity": "relu", "bias": False}),
}


class Packed(nn.Module):
    """Takes sequences of several lengths, and returns what a packed layer returns, padded."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=self.layer.batch_first, enforce_sorted=False)
        output, state = self.layer(packed)
        assert isinstance(output, PackedSequence)
        return pad_packed_sequence(output, batch_first=self.layer.batch_first)[0], state


class Unrolled(nn.Module):
    """A recurrence over a cell, from a state that is not zero."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x, state):
        state = (state, state) if isinstance(self.cell, nn.LSTMCell) else state
        for step in x:
            state = self.cell(step, state)
        return state


def build(name, packed=False):
    torch.manual_seed(0)
    if name in CELLS:
        kind, options = CELLS[name]
        return Unrolled(kind(FEATURES, HIDDEN, **options)), (
            torch.randn(STEPS, BATCH, FEATURES),
            torch.ones(BATCH, HIDDEN),
        )
    kind, options = MODELS[name]
    layer, x = kind(FEATURES, HIDDEN, **options), torch.randn(STEPS, BATCH, FEATURES)
    x = x.transpose(0, 1) if options.get("batch_first") else x
    return (Packed(layer), (x, torch.tensor([2, 4, 1]))) if packed else (layer, (x,))


@pytest.mark.parametrize("name", [*MODELS, *CELLS, *(f"{name}, packed" for name in MODELS if "batch first" in name)])
def test_every_promise_is_kept_and_every_weight_is_bayesian(name):
    packed, name = name.endswith(", packed"), name.removesuffix(", packed")
    assert not broken(Case(name, lambda: build(name, packed)[0], lambda model: (build(name, packed)[1], {})))
    assert not bnnify.convert(build(name)[0], strict=True).report.left_alone


@pytest.mark.parametrize("name", ["LSTM, two layers", "GRU, two layers", "RNN, relu", "GRUCell", "RNNCell"])
def test_in_a_draw_a_sequence_may_be_given_in_pieces(name):
    model, (x, *state) = build(name)
    bnn = bnnify.convert(model)
    with bnn.draw():
        if name in CELLS:
            whole, pieces = bnn(x, *state)[0], bnn(x[2:], bnn(x[:2], *state)[0])[0]
        else:
            whole, pieces = bnn(x)[0][0][2:], bnn(x[2:], bnn(x[:2])[0][1])[0][0]
    torch.testing.assert_close(pieces, whole)


@pytest.mark.parametrize("select", ["weight_hh_l0", ["weight_*", "bias_ih_l1"]])
def test_some_weights_of_a_layer_may_be_converted_alone(select):
    model, inputs = build("LSTM, two layers")
    bnn = bnnify.convert(model, select=select)
    assert len(bnn.report.bayesian) == (1 if isinstance(select, str) else 5)
    with bnn.draw():
        plain, output = drawn_network(bnn), bnn(*inputs)[0][0]
    torch.testing.assert_close(output, plain(*inputs)[0])
    assert not torch.equal(output, model(*inputs)[0])


def test_a_copy_made_by_torch_and_one_moved_to_another_dtype_still_draw():
    model, inputs = build("GRU, two layers")
    bnn = bnnify.convert(model)
    other = copy.deepcopy(bnn).double()
    inputs = (inputs[0].double(),)
    other.module.flatten_parameters()
    assert not torch.equal(other(*inputs)[0][0], other(*inputs)[0][0])
    with other.draw():
        torch.testing.assert_close(other(*inputs)[0][0], drawn_network(other)(*inputs)[0])
