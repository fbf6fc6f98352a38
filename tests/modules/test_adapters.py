"""LoRA pairs: how large the noise of their product is, and the rotation under which it has no preferred direction."""

import copy

import pytest
import torch
from torch import nn

import bnnify
from bnnify.distributions.gaussian import std
from bnnify.modules.adapters import adapter_pairs
from bnnify.modules.parameters import unique_bayesian_parameters

peft = pytest.importorskip("peft")


class Network(nn.Module):
    """A layer of each kind that peft adapts; what a layer gets is what it gave for an input of ones before."""

    def __init__(self):
        super().__init__()
        self.embed, self.conv, self.fc = nn.Embedding(7, 6), nn.Conv2d(3, 5, 3), nn.Linear(6, 9)

    def forward(self, ids):
        return self.fc(self.embed(ids)), self.conv(self.embed(ids).expand(3, 3, -1, -1))


def adapted(trained=True, **options):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["embed", "conv", "fc"], **options)
    model = peft.get_peft_model(Network(), config).double()
    if trained:
        for pair in adapter_pairs(model):
            pair.down.data.normal_(std=0.3)
            pair.up.data.normal_(std=0.2)
    return model


def update(pair):
    """ΔW, as a matrix."""
    return pair.scaling * pair.up.flatten(1) @ pair.down.flatten(1)


BOTH = ["*.lora_*", "*.lora_embedding_*.default"]
IDS = torch.arange(7).reshape(1, 7)


def noise_of_updates(bnn, draws=4000):
    """The rms of what noise does to each ΔW, over that of the weight it is added to."""
    pairs = list(adapter_pairs(bnn.module))
    posteriors = {id(p.mean): p for p in unique_bayesian_parameters(bnn.module)}
    found = []
    for pair in pairs:
        down, up = (
            factor
            + (0 if id(factor) not in posteriors else std(posteriors[id(factor)].rho))
            * torch.randn(draws, *factor.shape, dtype=factor.dtype)
            for factor in (pair.down, pair.up)
        )
        moved = pair.scaling * up.flatten(2) @ down.flatten(2) - update(pair)
        found.append((moved.square().mean().sqrt() / pair.base.square().mean().sqrt()).item())
    return found


@pytest.mark.parametrize("select", ["*.lora_*A.*", "*.lora_*B.*", BOTH])
@torch.no_grad()
def test_the_noise_of_the_update_is_the_fraction_of_the_weight_it_is_added_to(select):
    bnn = bnnify.convert(adapted(), select=select, posterior_std=bnnify.LoraStd(0.5))
    assert noise_of_updates(bnn) == pytest.approx([0.5] * 3, rel=0.05)


@torch.no_grad()
def test_without_a_rule_adapters_get_the_fraction_that_any_weight_gets():
    model = adapted()
    assert noise_of_updates(bnnify.convert(model, select=BOTH)) == pytest.approx([0.04] * 3, rel=0.05)


@torch.no_grad()
def test_of_a_fresh_adapter_b_has_all_of_the_noise():
    bnn = bnnify.convert(
        adapted(trained=False), select=["*.conv.lora_*", "*.fc.lora_*"], posterior_std=bnnify.LoraStd(0.5)
    )
    _, *noise = noise_of_updates(bnn)
    assert noise == pytest.approx([0.5] * 2, rel=0.05)


@torch.no_grad()
def test_tuning_measures_the_noise_of_an_adapter_by_the_weight_that_it_adapts():
    model = adapted()
    for pair in adapter_pairs(model):
        pair.down.data *= 1e-3  # an adapter that does next to nothing bears noise of many times its own size
    bnn = bnnify.convert(model, select="*.lora_*A.*", posterior_std=bnnify.LoraStd(0.1))
    options = {"likelihood": "gaussian", "output": lambda found: (found[0], torch.ones_like(found[0]))}
    tuned = bnnify.tune_std(bnn, [(IDS,)] * 4, labels=False, **options)
    assert tuned.ratio / tuned.factor == pytest.approx(0.1)
    assert tuned.after <= 0.005 < 1.6 * tuned.after  # σ ends where the tolerance does, and not at the size of A


def test_a_rotated_adapter_computes_what_it_did_and_its_b_is_orthogonal():
    model = adapted(use_dora=False)
    before = copy.deepcopy(model)
    assert bnnify.orthogonalize_adapters(model) == 3
    torch.testing.assert_close(model(IDS), before(IDS))
    for pair, old in zip(adapter_pairs(model), adapter_pairs(before), strict=True):
        torch.testing.assert_close(update(pair), update(old))
        columns = pair.up.flatten(1)
        length = old.up.square().sum() / 2
        torch.testing.assert_close(columns.T @ columns, length * torch.eye(2, dtype=torch.float64))
        assert not torch.allclose(pair.up, old.up)


def test_a_fresh_or_shared_adapter_stays_as_it_is():
    fresh = adapted(trained=False)
    shared = adapted()
    layers = shared.base_model.model
    layers.fc.lora_A["default"].weight = layers.embed.lora_embedding_B["default"]
    for model, rewritten in ((fresh, 0), (shared, 1)):
        before = copy.deepcopy(model.state_dict())
        assert bnnify.orthogonalize_adapters(model) == rewritten
        kept = [name for name in before if "conv" not in name]
        assert all(torch.equal(before[name], model.state_dict()[name]) for name in kept)


def test_a_bayesian_adapter_is_not_rotated():
    bnn = bnnify.convert(adapted(), select="*.lora_*")
    with pytest.raises(bnnify.ConversionError, match="Call orthogonalize_adapters before"):
        bnnify.orthogonalize_adapters(bnn.module)


def test_an_adapter_without_values_is_not_rotated():
    with pytest.raises(bnnify.ConversionError, match=r"lora_embedding_A.default. is on the meta device"):
        bnnify.orthogonalize_adapters(adapted().to("meta"))
