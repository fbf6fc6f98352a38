"""Bad input: a typed error that says where, what was found and what to do; and a failed conversion changes nothing."""

import copy
import threading

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrizations, prune

import bnnify
from bnnify import ConversionError, DrawError, Gaussian, Pretrained

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
    pytest.mark.filterwarnings("ignore:Lazy modules are a new feature"),
]


class Holder(nn.Module):
    """A parameter that belongs to no layer, next to a layer."""

    def __init__(self, parameter=None):
        super().__init__()
        self.table = parameter
        self.fc = nn.Linear(3, 2)


class Undeepcopyable(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.lock = threading.Lock()

    def forward(self, x):
        return self.fc(x)


def with_attribute(name, value=True):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    setattr(model[1], name, value)
    return model


def made_under_inference_mode():
    with torch.inference_mode():
        return nn.Sequential(nn.Linear(3, 2))


def frozen():
    return nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)).requires_grad_(False)


def quantized_dynamically():
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.ReLU(), nn.Linear(3, 2)), {nn.Linear})


def quantized_statically():
    return nn.Sequential(nn.Linear(3, 2), torch.ao.nn.quantized.Linear(3, 2))


def householder():
    layer = parametrizations.orthogonal(nn.Linear(2, 2, bias=False), orthogonal_map="householder")
    return nn.Sequential(nn.Linear(3, 2), layer)


def two_layers():
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))


def integer_table():
    return Holder(nn.Parameter(torch.arange(3), requires_grad=False))


# What is converted, how, and what the message has to say: where, what was found, what to do.
REFUSED = {
    "not a module": (lambda: 3, {}, ["int", "not a torch.nn.Module", "Pass the model"]),
    "a class": (lambda: nn.Linear, {}, ["type", "not a torch.nn.Module"]),
    "DataParallel": (
        lambda: nn.DataParallel(two_layers()),
        {},
        ["the model (DataParallel)", "`.module`", "Distributed"],
    ),
    "torch.compile": (
        lambda: torch.compile(two_layers()),
        {},
        ["the model (OptimizedModule)", "`._orig_mod`", "compile"],
    ),
    "inner torch.compile": (
        lambda: nn.Sequential(nn.ReLU(), torch.compile(nn.Linear(3, 2))),
        {},
        ["`1` (OptimizedModule)", "`._orig_mod`"],
    ),
    "scripted": (lambda: torch.jit.script(two_layers()), {}, ["the model", "ScriptModule", "model it was made from"]),
    "quantized dynamically": (
        quantized_dynamically,
        {},
        ["`1` (Linear)", "no floating-point weights", "convert first"],
    ),
    "quantized statically": (quantized_statically, {}, ["`1` (Linear)", "no floating-point weights", "convert first"]),
    "lazy": (
        lambda: nn.Sequential(nn.Linear(3, 2), nn.LazyLinear(2)),
        {},
        ["`1` (LazyLinear)", "no shape yet", "Run one forward"],
    ),
    "max_norm": (
        lambda: nn.Sequential(nn.Embedding(5, 3, max_norm=1.5), nn.Linear(3, 2)),
        {"select": ["0", "1"]},
        ["`0` (Embedding)", "max_norm=1.5", "Set max_norm=None or exclude"],
    ),
    "of a bag": (lambda: nn.EmbeddingBag(5, 3, max_norm=1.5), {"select": "weight"}, ["(EmbeddingBag)", "max_norm=1.5"]),
    "integer": (integer_table, {"select": ["table", "fc"]}, ["(Holder)", "torch.int64", "float32", "Exclude it"]),
    "complex": (
        lambda: nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, dtype=torch.complex64)),
        {},
        ["`1` (Linear)", "torch.complex64", "float32", "Exclude it"],
    ),
    "float8": (
        lambda: Holder(nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn))),
        {"select": "table"},
        ["(Holder)", "torch.float8_e4m3fn", "Exclude it"],
    ),
    "nothing at all": (nn.ReLU, {}, ["the model (ReLU)", "no parameters"]),
    "nothing by default": (
        lambda: nn.LayerNorm(3),
        {},
        ["the model (LayerNorm)", "not converted by default", "`select`"],
    ),
    "nothing with elements": (lambda: nn.Conv2d(0, 0, 3), {}, ["the model (Conv2d)", "no elements"]),
    "everything frozen": (
        frozen,
        {},
        ["the model (Sequential)", "frozen", "Set requires_grad, or select parameters by name"],
    ),
    "select matches nothing": (
        two_layers,
        {"select": "encoder.*"},
        ["select='encoder.*' matches nothing", "`0.weight`"],
    ),
    "a function selects nothing": (
        two_layers,
        {"select": lambda name, module: False},
        ["Nothing to convert in the model (Sequential)", "not selected", "`select`"],
    ),
    "select is a number": (two_layers, {"select": 3}, ["Unknown select 3", "a glob, a list of globs, or a function"]),
    "select is empty": (two_layers, {"select": []}, ["Unknown select []", "a glob, a list of globs, or a function"]),
    "a pattern of priors matches nothing": (
        two_layers,
        {"prior": {"0": Gaussian(), "head.*": Gaussian()}},
        ["pattern 'head.*' in prior=", "matches none"],
    ),
    "a pattern matches only what is not selected": (
        two_layers,
        {"select": "0", "posterior_std": {"1": 0.1}},
        ["pattern '1' in posterior_std=", "matches none of the parameters to convert"],
    ),
    "unknown prior": (two_layers, {"prior": "gaussian"}, ["Unknown prior 'gaussian'", "Gaussian(std=0.1)"]),
    "unknown estimator": (
        two_layers,
        {"estimator": "dropout"},
        ["Unknown estimator 'dropout'", "'reparameterization'"],
    ),
    "unknown posterior_std": (
        two_layers,
        {"posterior_std": "small"},
        ["Unknown posterior_std 'small'", "Relative(fraction)"],
    ),
    "posterior_std of zero": (
        two_layers,
        {"posterior_std": {"1": 0.0}},
        ["posterior_std must be a positive", "not 0.0"],
    ),
    "posterior_std of the wrong shape": (
        two_layers,
        {"posterior_std": {"1": lambda weight, scale: torch.ones(9)}},
        ["`1.weight`", "shape (9,)", "Return a scalar or one"],
    ),
    "collision with rho": (
        lambda: with_attribute("weight_rho"),
        {},
        ["`1` (Linear)", "already has an attribute `weight_rho`", "Rename it"],
    ),
    "collision with our own": (
        lambda: with_attribute("_bayesian"),
        {},
        ["`1` (Linear)", "already has an attribute `_bayesian`", "Rename it"],
    ),
    "strict, Householder": (
        householder,
        {"strict": True},
        ["strict=True", "`1.parametrizations.weight.original` (ParametrizationList)", "Householder", "'matrix_exp'"],
    ),
}


def snapshot(model):
    """Everything about a model that a conversion could change, by identity."""
    if not isinstance(model, nn.Module):
        return None
    modules = list(model.named_modules(remove_duplicate=False))
    return [
        [(name, type(module), id(module), module.training) for name, module in modules],
        [(name, sorted(vars(module))) for name, module in modules],
        [
            (name, kind, key, id(value), getattr(value, "requires_grad", None), getattr(value, "_version", None))
            for name, module in modules
            for kind in ("_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")
            for key, value in getattr(module, kind).items()
        ],
    ]


@pytest.mark.parametrize(("build", "settings", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_refused_where_it_is_with_what_to_do_and_changes_nothing(build, settings, said):
    model = build()
    before = snapshot(model)
    with pytest.raises(ConversionError) as error:
        bnnify.convert(model, inplace=True, **settings)
    assert [part for part in said if part not in str(error.value)] == []
    assert snapshot(model) == before


# Refusals that need a situation around them


def test_conversion_under_inference_mode_is_refused():
    model = two_layers()
    before = snapshot(model)
    with (
        torch.inference_mode(),
        pytest.raises(ConversionError, match=r"Sequential under torch.inference_mode\(\).*outside"),
    ):
        bnnify.convert(model, inplace=True)
    assert snapshot(model) == before


def test_conversion_under_no_grad_makes_a_trainable_model():
    with torch.no_grad():
        bnn = bnnify.convert(two_layers())
    output, kl = bnn(torch.ones(1, 3))
    (output.sum() + kl).backward()
    assert all(parameter.grad is not None for parameter in bnn.parameters() if parameter.requires_grad)


def test_inference_tensors_are_refused_in_place_and_copied_into_ordinary_ones_otherwise():
    model = made_under_inference_mode()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ConversionError, match=r"`0` \(Linear\).*created under torch.inference_mode\(\).*outside of it"):
        bnnify.convert(model, inplace=True)
    assert [type(module) for module in model.modules()] == before
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    bnn = bnnify.convert(model)
    bnn(torch.ones(1, 3))[0].sum().backward()
    assert bnn.module[0].weight.grad is not None


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def fully_sharded(model):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("this torch has no FSDP2")
    return fsdp.fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))


def flattened(model, **options):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return nn.Sequential(FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options))


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
@pytest.mark.parametrize("options", [{}, {"use_orig_params": True}], ids=str)
@pytest.mark.parametrize("inside", [False, True])
def test_fsdp1_around_a_converted_model_is_refused_by_name(options, inside, process_group):
    bnn = bnnify.convert(nn.Sequential(nn.Linear(3, 3)), prior=bnnify.Gaussian(std=1.0))
    with pytest.raises(bnnify.DrawError, match=r"\(FSDP1\).*`weight` of a BayesianLinear.*fully_shard"):
        if inside:
            bnn.module = flattened(bnn.module, **options)
        else:
            bnn = flattened(bnn, **options)
        bnn(torch.ones(1, 3))


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (
            nn.parallel.DistributedDataParallel,
            r"the model \(DistributedDataParallel\).*`.module` first and wrap the result",
        ),
        (
            lambda model: nn.Sequential(nn.parallel.DistributedDataParallel(model)),
            r"`0` \(DistributedDataParallel\).*`.module` first and wrap the result",
        ),
        (fully_sharded, r"the model \(FSDPSequential\).*Convert.*first"),
    ],
    ids=["DDP", "inner DDP", "FSDP2"],
)
def test_models_wrapped_for_several_processes_are_refused(wrap, said, process_group):
    model = wrap(two_layers())
    before = snapshot(model)
    with pytest.raises(ConversionError, match=said):
        bnnify.convert(model, inplace=True)
    assert snapshot(model) == before


def test_fsdp1_is_refused(monkeypatch):
    # Wrapping needs an accelerator, recognising does not.
    from torch.distributed.fsdp import FullyShardedDataParallel

    wrapped = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(wrapped)
    monkeypatch.setattr(FullyShardedDataParallel, "named_modules", nn.Module.named_modules)
    with pytest.raises(ConversionError, match=r"the model \(FullyShardedDataParallel\).*FSDP1.*convert.*fully_shard"):
        bnnify.convert(wrapped)


def test_in_place_is_a_way_out_for_what_cannot_be_copied():
    model = Undeepcopyable()
    bnn = bnnify.convert(model, inplace=True)
    assert bnn.module is model
    assert not torch.equal(bnn(torch.ones(1, 3))[0], bnn(torch.ones(1, 3))[0])
    for call in (lambda: bnnify.convert(Undeepcopyable()), lambda: bnnify.collapse(bnn)):
        with pytest.raises(ConversionError, match=r"Cannot deep-copy the model \(Undeepcopyable\).*lock.*inplace=True"):
            call()
    assert type(bnnify.collapse(bnn, inplace=True).fc) is nn.Linear


def test_strict_has_nothing_against_what_was_left_alone_by_choice():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 2).requires_grad_(False))
    assert len(bnnify.convert(model, strict=True).report.bayesian) == 2


def test_max_norm_is_no_obstacle_where_the_embedding_is_left_alone():
    model = nn.Sequential(nn.Embedding(5, 3, max_norm=1.0), nn.Linear(3, 2))
    assert [entry.name for entry in bnnify.convert(model).report.bayesian] == ["1.weight", "1.bias"]


def test_max_norm_is_refused_where_a_tie_makes_the_embedding_bayesian():
    model = nn.Sequential(nn.Embedding(5, 3, max_norm=1.0), nn.Linear(3, 5))
    model[1].weight = model[0].weight
    before = snapshot(model)
    with pytest.raises(ConversionError, match=r"`0` \(Embedding\): max_norm=1.0"):
        bnnify.convert(model, inplace=True)
    assert snapshot(model) == before


def test_a_refused_second_conversion_leaves_the_first():
    bnn = bnnify.convert(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)), inplace=True)
    before = snapshot(bnn.module)
    with pytest.raises(ConversionError):
        bnnify.convert(bnn, inplace=True, select=["1.weight"], prior={"1.weight": "nothing known"})
    assert snapshot(bnn.module) == before


# Surgery after the conversion


def prune_it(layer):
    prune.l1_unstructured(layer, "weight", 0.5)


def resize_it(layer):
    layer._parameters["weight"] = nn.Parameter(torch.zeros(5, 3))  # a setter would have refused


def delete_it(layer):
    del layer.weight


def delete_rho(layer):
    del layer.weight_rho


SURGERY = {
    "prune": (prune_it, "no longer a parameter"),
    "old weight_norm": (nn.utils.weight_norm, "no longer a parameter"),
    "new weight_norm": (parametrizations.weight_norm, "no longer a parameter"),
    "spectral_norm": (parametrizations.spectral_norm, "no longer a parameter"),
    "resize": (resize_it, r"shape is now \(5, 3\) but that of its rho is \(2, 3\)"),
    "delete": (delete_it, "no longer a parameter"),
    "delete rho": (delete_rho, "its rho is no longer a parameter"),
}


@pytest.mark.parametrize(("operate", "found"), SURGERY.values(), ids=SURGERY.keys())
@pytest.mark.parametrize("prior", [Pretrained(), Gaussian()], ids=["Pretrained", "Gaussian"])
def test_surgery_after_conversion_is_refused_at_the_next_draw_with_the_way_out(operate, found, prior):
    bnn = bnnify.convert(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), prior=prior)
    x = torch.ones(1, 3)
    bnn(x)
    operate(bnn.module[0])

    def draw():
        with bnn.draw():
            pass

    for use in (lambda: bnn(x), draw, bnn.kl, lambda: bnn.predict(x), lambda: bnn.sample(x, num_samples=2)):
        with pytest.raises(DrawError, match=rf"`(module\.)?0.weight` \(.*Linear\).*{found}.*bnnify.collapse first"):
            use()


def test_resizing_an_embedding_after_conversion_is_refused():
    bnn = bnnify.convert(nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)), select=["0", "1"])
    old = bnn.module[0]
    with pytest.raises(DrawError, match=r"Cannot replace `weight` of BayesianEmbedding.*collapse first"):
        old.weight = nn.Parameter(torch.cat([old.weight.detach(), torch.zeros(2, 3)]))
    assert bnn(torch.tensor([4]))[0].shape == (1, 2)


def test_fusing_a_batch_norm_after_conversion_is_refused():
    bnn = bnnify.convert(nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2))).eval()
    with pytest.raises(DrawError, match=r"Cannot replace `weight` of BayesianConv2d.*collapse first"):
        torch.nn.utils.fusion.fuse_conv_bn_eval(bnn.module[0], bnn.module[1])


def test_a_parameter_may_be_replaced_by_itself_and_by_load_state_dict():
    bnn = bnnify.convert(two_layers())
    bnn.module[0].weight = bnn.module[0].weight
    bnn.load_state_dict({name: 2 * value for name, value in bnn.state_dict().items()}, assign=True)
    bnn(torch.ones(1, 3))
    with pytest.raises(DrawError, match="Cannot replace"):
        bnn.module[0].weight = nn.Parameter(torch.ones(2, 3))


@pytest.mark.parametrize("operate", [prune_it, parametrizations.weight_norm, nn.utils.weight_norm, resize_it])
def test_collapsing_first_is_indeed_the_way_out(operate):
    model = bnnify.collapse(bnnify.convert(nn.Sequential(nn.Linear(3, 2), nn.Linear(5, 4))))
    operate(model[0])
    bnn = bnnify.convert(model, inplace=True)
    with bnn.draw():
        assert model[1].weight.shape == (4, 5)


def test_replacing_a_layer_after_conversion_makes_it_plain():
    bnn = bnnify.convert(two_layers())
    bnn.module[1] = nn.Linear(2, 7)
    output, kl = bnn(torch.ones(1, 3))
    assert output.shape == (1, 7)
    torch.testing.assert_close(kl, bnnify.convert(copy.deepcopy(bnn.module[:1])).kl())


def test_a_bias_set_to_none_after_conversion_is_no_surgery():
    bnn = bnnify.convert(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    bnn.module[0].bias = None
    assert bnn(torch.ones(4, 3))[0].shape == (4, 2)
