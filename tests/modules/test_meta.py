"""Models too large to build twice: converted on the meta device, where nothing is allocated, then loaded."""

import sys
import time

import pytest
import torch
from torch import nn

import bnnify
from bnnify.modules.parameters import unique_bayesian_parameters


class Rotary(nn.Module):
    """As language models have it: a buffer that is computed when it is made and never saved."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.tensor([0.1, 0.2, 0.4, 0.6, 0.8, 1.0]), persistent=False)


class LanguageModel(nn.Module):
    """A tied head, saved and unsaved buffers, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.rotary = Rotary()
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        hidden = self.embed(ids) * self.rotary.frequencies
        return self.head(self.norm(self.frozen(hidden).mT).mT)


def trained() -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel()
    model.norm.running_mean.normal_()
    with torch.no_grad():
        model.embed.weight.mul_(torch.linspace(0.1, 3.0, 6))
    return model.eval()


def converted_on_meta(**options) -> bnnify.BayesianModel:
    with torch.device("meta"):
        model = LanguageModel()
    model.rotary = Rotary()
    return bnnify.convert(model.eval(), **options)


def test_seven_billion_parameters_convert_in_seconds_without_being_allocated():
    transformers = pytest.importorskip("transformers")
    resource = pytest.importorskip("resource")

    def peak() -> float:
        """The most memory this process has had, in GB."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)

    before, start = peak(), time.perf_counter()
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig())
    bnn = bnnify.convert(model)
    assert sum(parameter.mean.numel() for parameter in unique_bayesian_parameters(bnn.module)) > 6.6e9
    assert all(tensor.is_meta for tensor in bnn.state_dict().values())
    assert peak() - before < 0.5  # in float32, the means alone have 26 GB
    assert time.perf_counter() - start < 30


@pytest.mark.parametrize("posterior_std", [None, 0.01, bnnify.Moped(0.1)])
@pytest.mark.parametrize("select", [None, ["embed", "frozen.weight"]])
def test_loading_gives_what_converting_the_loaded_model_gives(posterior_std, select):
    options = {"select": select} | ({} if posterior_std is None else {"posterior_std": posterior_std})
    bnn = converted_on_meta(**options)
    assert all(parameter.is_meta for parameter in bnn.parameters())
    bnnify.load_weights(bnn, trained().state_dict())

    reference = bnnify.convert(trained(), **options)
    found, wanted = dict(bnn.named_parameters()), dict(reference.named_parameters())
    assert found.keys() == wanted.keys()
    for name, parameter in wanted.items():
        assert torch.equal(found[name], parameter), name
        assert found[name].requires_grad == parameter.requires_grad, name
    assert all(torch.equal(a, b) for a, b in zip(bnn.buffers(), reference.buffers(), strict=True))
    assert torch.equal(bnn.kl(), reference.kl())
    ids = torch.arange(10).reshape(2, 5)
    for seed in (1, 2):
        torch.manual_seed(seed)
        output, _ = bnn(ids)
        torch.manual_seed(seed)
        assert torch.equal(output, reference(ids)[0])


def test_a_prior_mean_does_not_move_with_the_mean():
    bnn = converted_on_meta()
    state = trained().state_dict()
    bnnify.load_weights(bnn, state)
    with torch.no_grad():
        bnn.module.head.weight.add_(1.0)
    assert torch.equal(bnn.module.head.weight_prior_mean, trained().head.weight)
    assert bnn.kl() > 1.0


def test_the_model_takes_the_dtype_of_the_file():
    bnn = converted_on_meta()
    bnnify.load_weights(bnn, trained().bfloat16().state_dict())
    assert {p.dtype for name, p in bnn.named_parameters() if not name.endswith("_rho")} == {torch.bfloat16}


def test_a_converted_models_own_file_is_loaded_as_it_is():
    reference = bnnify.convert(trained())
    with torch.no_grad():
        reference.module.head.weight_rho.add_(torch.randn(11, 6))
        reference.module.head.weight.add_(torch.randn(11, 6))
    bnn = converted_on_meta()
    bnnify.load_weights(bnn, reference.module.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(bnn.parameters(), reference.parameters(), strict=True))
    assert torch.equal(bnn.kl(), reference.kl())


def test_a_buffer_that_no_file_holds_must_have_a_value_and_nothing_is_loaded_without():
    with torch.device("meta"):
        bnn = bnnify.convert(LanguageModel())
    with pytest.raises(bnnify.CheckpointError, match=r"No state_dict holds `rotary\.frequencies`.*Nothing was loaded"):
        bnnify.load_weights(bnn, trained().state_dict())
    assert all(tensor.is_meta for tensor in bnn.state_dict().values())
    with torch.device("meta"):
        alone = bnnify.convert(nn.Sequential(Rotary(), nn.Linear(2, 2)))
    with pytest.raises(bnnify.CheckpointError, match=r"No state_dict holds `0\.frequencies`"):
        bnnify.load_weights(alone, {})


@pytest.mark.parametrize("rule", ["posterior_of", "LoraStd"])
def test_a_rule_that_needs_the_values_says_so(rule):
    with torch.device("meta"):
        layer = nn.Linear(3, 2)
    options = {"posterior_std": bnnify.LoraStd()}
    if rule == "posterior_of":
        options = {"prior": bnnify.posterior_of(bnnify.convert(nn.Linear(3, 2)))}
    with pytest.raises(bnnify.ConversionError, match=r"`weight` on the meta device.* needs the values of the weights"):
        bnnify.convert(layer, **options)
