"""The real pretrained ResNet-20: its checkpoint loads, and the defaults improve it before any training."""

import pytest
import torch

import bnnify
from benchmarks.harness import data, evaluation
from benchmarks.harness.networks import cifar_resnet


@pytest.fixture(scope="module")
def resnet(data_folder):
    return cifar_resnet.resnet20(data_folder / "checkpoints" / cifar_resnet.CHECKPOINT).eval()


def scores(bnn, images):
    inputs = cifar_resnet.inputs(images.pixels)
    with torch.no_grad():
        plain = evaluation.evaluate(torch.cat([bnn.module(x) for x in inputs.split(500)]).softmax(1), images.labels, 2)
    torch.manual_seed(0)
    prediction = bnn.predict(inputs, num_samples=10, likelihood="logits")
    return plain, evaluation.evaluate(prediction.mean, images.labels, 2)


def test_the_checkpoint_loads_into_a_converted_model_as_its_original(data_folder, resnet):
    path = data_folder / "checkpoints" / cifar_resnet.CHECKPOINT
    bnn = bnnify.convert_checkpoint(path, cifar_resnet.resnet20)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(bnn.module(x), resnet(x))
    plain = bnnify.collapse(bnn).state_dict()
    assert all(torch.equal(plain[key], value) for key, value in resnet.state_dict().items() if "batches" not in key)


@pytest.mark.parametrize("kind", ["clean", "JPEG"])
def test_the_default_improves_it_a_little_and_a_sigma_from_data_a_lot(data_folder, resnet, kind):
    clean = data.cifar10(train=False, data=data_folder)
    images = clean if kind == "clean" else data.cifar10_jpeg(data_folder).take(slice(None, None, 10))
    plain, converted = scores(bnnify.convert(resnet), images)
    assert converted.accuracy > plain.accuracy - 0.005
    assert converted.nll < plain.nll
    assert converted.ece < plain.ece
    seen = list(cifar_resnet.inputs(clean.pixels[:200]).split(100))
    _, converted = scores(bnnify.convert(resnet, posterior_std=bnnify.ResponseStd(seen, 0.15)), images)
    assert converted.accuracy > plain.accuracy - 0.006
    nll, ece = {"clean": (0.30, 0.03), "JPEG": (0.66, 0.04)}[kind]
    assert converted.nll <= nll < plain.nll
    assert converted.ece <= ece < plain.ece
