"""Noise of tensors of any layout: standard normal, everywhere, and the same from whatever draws it."""

import pytest
import torch
from torch import nn

import bnnify
from bnnify.draws.noise import noise_like, standard_normal_

LAYOUTS = {
    "contiguous": torch.empty(64, 32, 5, 5),
    "channels last": torch.empty(64, 32, 5, 5).contiguous(memory_format=torch.channels_last),
    "transposed": torch.empty(256, 200).t(),
    "permuted": torch.empty(64, 32, 5, 5).permute(2, 0, 3, 1),
    "every other": torch.empty(512, 200)[::2],
    "expanded": torch.empty(256, 1).expand(256, 200),
    "half": torch.empty(256, 200, dtype=torch.bfloat16).t(),
}


@pytest.mark.parametrize("like", LAYOUTS.values(), ids=LAYOUTS)
def test_noise_is_standard_normal_whatever_the_layout(like):
    noise = noise_like(like)
    assert (noise.shape, noise.dtype, noise.device) == (like.shape, like.dtype, like.device)
    assert noise.stride() == torch.empty_like(like).stride()
    # Bounds of four standard errors, in each half of each dimension: no part is left out or repeated.
    for dim in range(noise.ndim):
        for half in noise.double().chunk(2, dim):
            n = half.numel()
            assert abs(half.mean()) < 4 / n**0.5
            assert abs(half.square().mean() - 1) < 4 * (2 / n) ** 0.5
            assert abs(half.pow(4).mean() - 3) < 4 * (96 / n) ** 0.5
    if noise.dtype == torch.float32:
        assert noise.unique().numel() > 0.99 * noise.numel()


@pytest.mark.parametrize("like", LAYOUTS.values(), ids=LAYOUTS)
def test_the_same_seed_gives_the_same_noise_in_place(like):
    noise = noise_like(like)
    torch.manual_seed(0)
    assert torch.equal(standard_normal_(torch.empty_like(like)), noise)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(standard_normal_(torch.empty_like(like), generator), noise)


def test_noise_lies_in_memory_as_that_of_a_contiguous_tensor_does():
    contiguous = noise_like(torch.empty(5, 3, 3, 7))
    torch.manual_seed(0)
    channels_last = noise_like(torch.empty(5, 7, 3, 3).contiguous(memory_format=torch.channels_last))
    assert torch.equal(channels_last.permute(0, 2, 3, 1), contiguous)


def test_compiled_code_draws_contiguous_noise():
    like = LAYOUTS["channels last"]
    assert torch.compile(noise_like, backend="eager", fullgraph=True)(like).is_contiguous()


def test_a_model_in_channels_last_predicts_as_it_draws():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(memory_format=torch.channels_last)
    bnn = bnnify.convert(model)
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    torch.manual_seed(1)
    predicted = bnn.predict(x, 3).mean
    torch.manual_seed(1)
    drawn = []
    with torch.no_grad():
        for _ in range(3):
            with bnn.draw():
                drawn.append(bnn.module(x))
    torch.testing.assert_close(predicted, torch.stack(drawn).mean(0))
