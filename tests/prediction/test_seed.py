"""A seed names the networks of a prediction: in any thread, in any call, and for as many batches as there are."""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bnnify
from bnnify.prediction.averages import Prediction
from bnnify.prediction.known_code import State
from tests import zoo

NAMES = ("mean", "std", "predictive_entropy", "expected_entropy")
WAYS = {
    "one after another": {},
    "in pairs": {"antithetic": True},
    "at once": {"networks_at_once": 3},
    "in closed form": {"closed_form": True},
}


def converted(mode: bool = False) -> bnnify.BayesianModel:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3)]
    return bnnify.convert(nn.Sequential(*layers), select="4.*", posterior_std=0.3).train(mode)


def equal(first: Prediction, second: Prediction) -> bool:
    pairs = [(getattr(first, name), getattr(second, name)) for name in NAMES]
    return all(a is b is None or torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def take_turns_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def check_in_threads(predict: Callable[[int], Prediction]) -> None:
    """Calls with four seeds, twenty times in four threads, have to give what they give alone."""
    alone = [predict(seed) for seed in range(4)]
    assert not any(equal(alone[0], other) for other in alone[1:])
    # OpenMP counts its own threads for each thread that calls it, and sums are rounded otherwise with another number.
    with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)) as threads:
        found = list(threads.map(predict, [*range(4)] * 5))
    assert all(map(equal, found, alone * 5))


@pytest.mark.usefixtures("take_turns_often")
@pytest.mark.parametrize("mode", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("way", WAYS)
def test_predictions_in_threads_are_those_of_the_same_calls_alone(way, mode):
    bnn, x = converted(mode), torch.randn(8, 4)
    check_in_threads(lambda seed: bnn.predict(x, 5, likelihood="logits", seed=seed, **WAYS[way]))
    assert {module.training for module in bnn.modules()} == {mode}


@pytest.mark.usefixtures("take_turns_often")
@pytest.mark.parametrize("name", zoo.ZOO)
def test_every_model_predicts_in_threads_what_it_predicts_alone(name):
    model, inputs = zoo.build(name)
    bnn = bnnify.convert(model)
    check_in_threads(lambda seed: bnn.predict(inputs, 2, seed=seed, output=lambda output: zoo.tensors(output)[0]))


def test_a_model_to_which_the_forward_of_another_thread_adds_something_can_be_looked_through():
    class Held(dict):
        def values(self):
            model.cache = torch.ones(1)
            return super().values()

    model = nn.Linear(4, 3)
    model.held = Held()
    State(model)
    assert "cache" in vars(model)


def test_the_random_numbers_of_the_program_and_of_a_call_with_a_seed_are_not_the_same_ones():
    bnn, x = converted(), torch.randn(8, 4)
    first = bnn.predict(x, 4, seed=1)
    state = torch.get_rng_state()
    again = bnn.predict(x, 4, seed=np.int64(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.mean, again.mean)
    assert not torch.equal(first.mean, bnn.predict(x, 4).mean)


def test_the_first_networks_of_many_are_those_of_few():
    bnn, x, outputs = converted(), torch.randn(8, 4), []
    for num_samples in (2, 4):
        outputs.append([])
        bnn.predict(x, num_samples, seed=1, output=lambda output: outputs[-1].append(output.clone()) or output)
    assert all(map(torch.equal, outputs[0], outputs[1]))
    assert len(outputs[1]) == 4


@pytest.mark.parametrize("way", [way for way in WAYS if way != "in closed form"])
def test_batches_that_are_predicted_one_at_a_time_see_the_networks_of_the_whole_loader(way):
    bnn = converted()
    loader = DataLoader(TensorDataset(torch.randn(10, 4), torch.zeros(10)), batch_size=4)
    options = {"num_samples": 4, "likelihood": "logits", "seed": 7, **WAYS[way]}
    whole = bnn.predict(loader, **options)
    streamed = (bnn.predict([batch], **options) for batch in loader)
    information = torch.cat([prediction.mutual_information for prediction in streamed])
    assert torch.equal(information, whole.mutual_information)


@pytest.mark.parametrize(
    ("seed", "error"), [(-1, bnnify.ArgumentError), (2**63, bnnify.ArgumentError), (1.0, bnnify.ArgumentTypeError)]
)
def test_what_is_no_seed_is_refused(seed, error):
    with pytest.raises(error, match="seed must be an integer"):
        converted().predict(torch.randn(8, 4), seed=seed)
