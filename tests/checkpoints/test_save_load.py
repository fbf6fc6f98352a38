"""Loading and saving: nothing missing goes unnoticed, nothing is half-loaded or half-written."""

import copy
import datetime

import pytest
import torch
import torchvision
from torch import nn

import bnnify
from bnnify.checkpoints import own_format as posterior_file
from bnnify.checkpoints.settings_data import settings_as_data
from bnnify.modules.parameters import bayesian_parameters
from tests import zoo


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda state: state.pop("3.bias"), r"missing: 3\.bias"),
        (lambda state: state.pop("1.running_mean"), r"missing: 1\.running_mean"),
        (lambda state: state.update(extra=torch.ones(1)), "unexpected: extra"),
        (lambda state: state.update({"9.weight_rho": torch.ones(1)}), r"unexpected: 9\.weight_rho"),
        (lambda state: state.update({"3.bias": torch.ones(4)}), r"of another shape: 3\.bias \(4,\) for \(3,\)"),
        (lambda state: state.update({"3.weight_rho": torch.ones(1)}), r"of another shape: 3\.weight_rho"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused_whole(change, complaint):
    bnn = bnnify.convert(network())
    before = copy.deepcopy(bnn.state_dict())
    state = {key: value + 1 for key, value in network().state_dict().items()}
    change(state)
    with pytest.raises(bnnify.CheckpointError, match=complaint):
        bnnify.load_weights(bnn, state)
    assert all(torch.equal(before[key], value) for key, value in bnn.state_dict().items())


def test_an_old_file_without_the_count_of_batches_loads():
    state = network().state_dict()
    del state["1.num_batches_tracked"]
    bnnify.load_weights(bnnify.convert(network()), state)


def test_a_tied_weight_may_be_in_the_file_once():
    trained = zoo.TiedLanguageModel()
    state = trained.state_dict()
    del state["embed.weight"]
    bnn = bnnify.convert(zoo.TiedLanguageModel())
    bnnify.load_weights(bnn, state)
    assert torch.equal(bnn.module.embed.weight, trained.embed.weight)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("of", [lambda bnn: bnn, lambda bnn: bnn.module], ids=["bnn", "module"])
def test_loading_with_assign_keeps_ties(of, device):
    source = bnnify.convert(zoo.TiedLanguageModel())
    with torch.device(device):
        bnn = bnnify.convert(zoo.TiedLanguageModel(), inplace=True)
    of(bnn).load_state_dict({name: value.clone() for name, value in of(source).state_dict().items()}, assign=True)
    for ending in ("", "_rho", "_prior_mean"):
        assert bnn.module.head._parameters["weight" + ending] is bnn.module.embed._parameters["weight" + ending]
    assert torch.equal(bnn.kl(), source.kl())
    of(bnn).load_state_dict(of(bnnify.convert(zoo.TiedLanguageModel())).state_dict(), assign=True)
    with bnn.draw():
        assert bnn.module.embed.weight is bnn.module.head.weight


class RenamesWhatItLoads(nn.Module):
    """Takes the weights of an older version of itself, in which its layer had another name."""

    def __init__(self, register):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        getattr(self, register)(lambda *args: self.rename(*args[len(args) - 7 :]))

    def rename(self, state_dict, prefix, *_):
        for name in [name for name in state_dict if name.startswith(prefix + "old.")]:
            state_dict[prefix + "layer." + name.removeprefix(prefix + "old.")] = state_dict.pop(name)


class TransposesWhatItLoads(nn.Linear):
    def _load_from_state_dict(self, state_dict, prefix, *args):
        if prefix + "kernel" in state_dict:
            state_dict[prefix + "weight"] = state_dict.pop(prefix + "kernel").T
        super()._load_from_state_dict(state_dict, prefix, *args)


OLD_LINEAR = {"old.weight": (2, 3), "old.bias": (2,)}
OLD_LAYOUTS = {
    "a hook": (lambda: RenamesWhatItLoads("register_load_state_dict_pre_hook"), OLD_LINEAR),
    "a private hook": (lambda: RenamesWhatItLoads("_register_load_state_dict_pre_hook"), OLD_LINEAR),
    "a loader of its own": (lambda: TransposesWhatItLoads(3, 2), {"kernel": (3, 2), "bias": (2,)}),
}


@pytest.mark.parametrize("inside", ["", "0."], ids=["alone", "in a model"])
@pytest.mark.parametrize(("make", "shapes"), OLD_LAYOUTS.values(), ids=OLD_LAYOUTS)
def test_weights_are_loaded_by_the_hooks_and_loaders_of_the_modules(make, shapes, inside):
    def made():
        return nn.Sequential(make()) if inside else make()

    torch.manual_seed(0)
    state = {inside + name: torch.randn(shape) for name, shape in shapes.items()}
    trained, bnn = made(), bnnify.convert(made(), select="*weight")
    trained.load_state_dict(state)
    bnnify.load_weights(bnn, state)
    reference = bnnify.convert(trained, select="*weight")
    for name, value in reference.state_dict().items():
        assert torch.equal(bnn.state_dict()[name], value), name


def test_the_prefixes_of_wrappers_are_stripped_from_weights():
    for wrapper in ["module.", "_orig_mod.", "model.", "module._orig_mod."]:
        trained = network()
        bnn = bnnify.convert(network())
        bnnify.load_weights(bnn, {wrapper + name: value + 1 for name, value in trained.state_dict().items()})
        assert torch.equal(bnn.module[0].weight, trained[0].weight + 1)


def test_a_prefix_that_is_the_models_own_is_kept():
    model = nn.ModuleDict({"module": nn.Linear(2, 2)})
    bnn = bnnify.convert(model)
    bnnify.load_weights(bnn, {name: value + 1 for name, value in model.state_dict().items()})
    bnnify.load_weights(bnn, {"module." + name: value + 2 for name, value in model.state_dict().items()})
    assert torch.equal(bnn.module["module"].bias, model["module"].bias + 2)


def test_thousands_of_names_that_do_not_fit_are_a_short_message():
    with pytest.raises(bnnify.CheckpointError) as caught:
        bnnify.load_weights(bnnify.convert(network()), {f"layer.{i}.weight": torch.ones(1) for i in range(3000)})
    assert "unexpected: layer.0.weight, layer.1.weight, layer.2.weight and 2997 more" in str(caught.value)
    assert len(str(caught.value)) < 400


def test_what_is_no_state_dict_is_refused():
    for wrong in [None, 3, [torch.ones(1)], {1: torch.ones(1)}, nn.Linear(2, 2)]:
        with pytest.raises(bnnify.CheckpointError, match="load_weights takes a state_dict"):
            bnnify.load_weights(bnnify.convert(network()), wrong)


class Graph(nn.Module):
    """A graph convolution that keeps its adjacency matrix."""

    def __init__(self, adjacency, extra=None):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.extra = extra
        self.register_buffer("adjacency", adjacency)

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state

    def forward(self, x):
        return self.adjacency @ self.layer(x)


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("layout", ["coo", "csr", "csc", "not coalesced", "hybrid"])
def test_sparse_buffers_are_saved_and_loaded(layout, tmp_path):
    dense = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 3.0]])
    adjacency = {
        "coo": dense.to_sparse(),
        "csr": dense.to_sparse_csr(),
        "csc": dense.to_sparse_csc(),
        "not coalesced": torch.sparse_coo_tensor([[0, 0], [1, 1]], [0.5, 1.5], (3, 3)),
        "hybrid": dense.to_sparse(1),
    }[layout]
    bnn = bnnify.convert(Graph(adjacency), inplace=True)
    bnnify.save(bnn, tmp_path / "x.bnn.pt")
    file = posterior_file.open_posterior(tmp_path / "x.bnn.pt")
    assert file.state_dict["adjacency"].layout == adjacency.layout
    assert torch.equal(file.state_dict["adjacency"].to_dense(), adjacency.to_dense())
    if adjacency.layout == torch.sparse_coo:  # others cannot be copied, as load does with the model
        loaded = bnnify.load(tmp_path / "x.bnn.pt", Graph(torch.eye(3).to_sparse()))
        x = torch.randn(3, 3)
        if layout != "hybrid":
            assert torch.equal(loaded.module(x), bnn.module(x))
    with pytest.raises(bnnify.CheckpointError, match=r"nothing but dense tensors.*`adjacency`"):
        bnnify.save(bnn, tmp_path / "x.bnn.safetensors")


@pytest.mark.parametrize("extra", [datetime.date(2026, 1, 1), print, lambda: None, torch.eye(2).to_mkldnn()])
def test_what_could_not_be_loaded_is_refused_by_save_and_leaves_nothing(extra, tmp_path):
    (tmp_path / "x.bnn.pt").write_bytes(b"precious")
    with pytest.raises(bnnify.CheckpointError, match=r"Cannot write.*state_dict holds what"):
        bnnify.save(bnnify.convert(Graph(torch.eye(3), extra), inplace=True), tmp_path / "x.bnn.pt")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("x.bnn.pt", b"precious")]


def test_settings_per_parameter_survive_save_and_load(tmp_path):
    bnn = bnnify.convert(
        network(),
        select=["0", "3.weight"],
        prior={"0.*": bnnify.Gaussian(mean=0.1, std=0.3)},
        posterior_std={"0.weight": 0.01, "3.*": bnnify.Moped(0.1)},
    )
    bnnify.save(bnn, tmp_path / "x.pt")
    other = bnnify.load(tmp_path / "x.pt", network())
    ours, theirs = (
        {p.name: (str(p.settings), p.initial_std) for p in bayesian_parameters(b.module)} for b in (bnn, other)
    )
    assert ours == theirs
    assert len(ours) == 3


def test_a_prior_of_the_users_own_cannot_be_saved_and_nothing_is_written(tmp_path):
    class Flat(bnnify.Prior):
        def kl(self, posterior):
            return posterior.mean.sum() * 0

    bnn = bnnify.convert(nn.Linear(2, 2), prior=Flat())
    with pytest.raises(bnnify.CheckpointError, match=r"`weight`.*is not one of bnnify's own"):
        bnnify.save(bnn, tmp_path / "x.pt")
    assert not list(tmp_path.iterdir())


def test_files_that_are_not_ours_are_told_apart(tmp_path):
    path = tmp_path / "x.pt"
    with pytest.raises(bnnify.CheckpointError, match="Cannot read"):
        bnnify.load(path, nn.Linear(2, 2))
    torch.save(nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(bnnify.CheckpointError, match="was not written by bnnify"):
        bnnify.load(path, nn.Linear(2, 2))
    bnnify.save(bnnify.convert(nn.Linear(2, 2)), path)
    with pytest.raises(bnnify.CheckpointError, match="does not fit"):
        bnnify.load(path, nn.Linear(3, 2))
    with pytest.raises(bnnify.CheckpointError, match="does not fit the model"):
        bnnify.load(path, nn.Sequential(nn.Linear(2, 2)))
    content = torch.load(path, weights_only=True)
    content["bnnify"]["format"] = 99
    torch.save(content, path)
    with pytest.raises(bnnify.CheckpointError, match=r"format 99.*Upgrade"):
        bnnify.load(path, nn.Linear(2, 2))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_of_others_that_uses_our_name_as_a_key_is_theirs(suffix, tmp_path):
    model, path = nn.Linear(2, 2), tmp_path / f"x{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": model.state_dict(), "bnnify": {"format": 4, "note": "to be converted"}}, path)
    else:
        pytest.importorskip("safetensors.torch").save_file(model.state_dict(), path, {"bnnify": "to be converted"})
    bnn = bnnify.convert_checkpoint(path, lambda: nn.Linear(2, 2))
    assert torch.equal(bnn.module.weight, model.weight)
    with pytest.raises(bnnify.CheckpointError, match="was not written by bnnify"):
        bnnify.load(path, model)


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 10))


def gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8, "vocab_size": 50}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()


@pytest.mark.parametrize(("kind", "fresh"), [("state_dict", False), ("state_dict", True), ("directory", False)])
def test_a_checkpoint_is_converted_as_the_model_with_its_weights_is(kind, fresh, tmp_path):
    """So with a σ that is measured on data, and where the weights tell whether they are trained."""
    model, x = (classifier(), torch.randn(32, 16)) if kind == "state_dict" else (gpt2(), torch.randint(50, (4, 8)))
    if not fresh:
        for parameter in model.parameters():
            parameter.data *= torch.linspace(0.1, 3, len(parameter)).reshape(-1, *[1] * (parameter.ndim - 1))
    if kind == "state_dict":
        torch.save(model.state_dict(), tmp_path / "x.pt")
        file = [tmp_path / "x.pt", classifier]
    else:
        model.save_pretrained(tmp_path)
        file = [tmp_path]
    for rule in None, bnnify.ResponseStd(x, 0.1):
        options = {} if rule is None else {"posterior_std": rule}
        expected = bnnify.convert(model, **options)
        assert bool(expected.report.untrained) == fresh
        for for_writing in False, True:
            found = bnnify.convert_checkpoint(*file, for_writing=for_writing, **options)
            assert str(found.report) == str(expected.report)
            torch.testing.assert_close(found.module.state_dict(), expected.module.state_dict())


@pytest.mark.parametrize("parallel", [False, True])
def test_a_file_tells_the_modules_their_versions(parallel, tmp_path):
    class Versioned(nn.Linear):
        _version = 3

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
            self.found = local_metadata.get("version")
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    model = nn.Sequential(Versioned(2, 2))
    torch.save({"state_dict": (nn.DataParallel(model) if parallel else model).state_dict()}, tmp_path / "x.pt")
    bnn = bnnify.convert_checkpoint(tmp_path / "x.pt", lambda: nn.Sequential(Versioned(2, 2)))
    assert bnn.module[0].found == 3


ENDINGS = pytest.mark.parametrize("ending", [".bnn.pt", ".safetensors"])


@ENDINGS
@pytest.mark.parametrize(
    "name", ["root_linear", "residual_block", "tied_language_model", "lstm", "bfloat16", "transposed"]
)
def test_a_file_gives_back_the_posterior_of_every_kind_of_model(name, ending, tmp_path):
    if ending == ".safetensors":
        pytest.importorskip("safetensors")
    model, inputs = zoo.build(name)
    bnn = bnnify.convert(model, prior=bnnify.Gaussian(std=0.3))
    with torch.no_grad():
        for parameter in bnn.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    bnnify.save(bnn, tmp_path / f"x{ending}")
    other = bnnify.load(tmp_path / f"x{ending}", zoo.build(name)[0])
    expected, found = bnn.state_dict(), other.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert zoo.equal(other.module(*inputs), bnn.module(*inputs))
    assert torch.equal(other.kl(), bnn.kl())


@ENDINGS
def test_what_needs_no_architecture_works_on_the_file_alone(ending, tmp_path):
    if ending == ".safetensors":
        pytest.importorskip("safetensors")
    bnn = bnnify.convert(zoo.TiedLanguageModel(), prior=bnnify.Laplace())
    bnnify.save(bnn, tmp_path / f"x{ending}")
    file = posterior_file.open_posterior(tmp_path / f"x{ending}")
    alone = file.parameters_alone()
    torch.testing.assert_close(alone.kl(), bnn.kl())
    ratios, expected = bnnify.signal_to_noise(alone), bnnify.signal_to_noise(bnn)
    assert sum(ratio.numel() for ratio in ratios.values()) == sum(ratio.numel() for ratio in expected.values())
    plain = file.plain_state_dict
    assert plain.keys() <= bnnify.collapse(bnn).state_dict().keys()
    assert all(torch.equal(bnnify.collapse(bnn).state_dict()[name], tensor) for name, tensor in plain.items())
    if ending == ".bnn.pt":  # safetensors have no place for it
        assert plain._metadata == bnnify.collapse(bnn).state_dict()._metadata


def test_a_file_of_a_model_that_was_not_recognised_needs_the_model(tmp_path):
    bnnify.save(bnnify.convert(network()), tmp_path / "net.bnn.pt")
    with pytest.raises(bnnify.CheckpointError, match="does not say how to make its model"):
        bnnify.load(tmp_path / "net.bnn.pt")


def test_a_model_that_is_only_to_be_written_shares_memory_and_the_one_that_is_read_does_not(tmp_path):
    network = torchvision.models.squeezenet1_1(num_classes=5)
    torch.save(network.state_dict(), tmp_path / "net.pt")
    bnn = bnnify.convert_checkpoint(tmp_path / "net.pt", for_writing=True)
    bnnify.save(bnn, tmp_path / "net.bnn.pt")
    assert (tmp_path / "net.bnn.pt").stat().st_size < 2.2 * (tmp_path / "net.pt").stat().st_size
    for model in (None, network):
        loaded = bnnify.load(tmp_path / "net.bnn.pt", model)
        with torch.no_grad():
            for parameter in bayesian_parameters(loaded.module):
                before = parameter.mean.clone()
                parameter.mean.add_(1)
                assert torch.equal(parameter.prior_mean, before)


def tampered(path, change):
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


DAMAGES = {
    "`{}` is damaged: ": [
        lambda c: c["bnnify"].pop("settings"),
        lambda c: c["bnnify"].update(settings=[1]),
        lambda c: c["bnnify"]["settings"]["0.weight"].pop("prior"),
        lambda c: c["bnnify"]["settings"]["0.weight"].update(prior={"kind": "Evil"}),
        lambda c: c["bnnify"]["settings"]["0.weight"].update(prior={"kind": "Gaussian", "sdt": 1.0}),
        lambda c: c["bnnify"]["settings"]["0.weight"].update(prior={"kind": "Gaussian", "std": -1.0}),
        lambda c: c["bnnify"]["settings"]["0.weight"].update(estimator="magic"),
        lambda c: c["bnnify"]["settings"]["0.weight"].update(initial_std="big"),
        lambda c: c["bnnify"]["settings"].update(absent=c["bnnify"]["settings"]["0.weight"]),
        lambda c: c["bnnify"].update(format="two"),
        lambda c: c["bnnify"].pop("format"),
        lambda c: c["bnnify"].update(recipe={"library": "os", "builder": "system"}),
        lambda c: c["bnnify"].update(recipe=7),
        lambda c: c["bnnify"].update(layout={"kind": "other"}),
        lambda c: c["state_dict"].update({"0.weight_initial_std": torch.ones(2)}),
        lambda c: c["state_dict"].pop("0.weight_rho"),
        lambda c: c["state_dict"].pop("0.weight"),
        lambda c: c["state_dict"].update({"0.weight_rho": torch.zeros(1)}),
        lambda c: c["state_dict"].update({"0.weight_rho": torch.zeros(2, 1, 3, 3, dtype=torch.int64)}),
    ],
    "Cannot read `{}`: no state_dict was found": [
        lambda c: c["state_dict"].update({"0.weight_initial_std": "big"}),
        lambda c: c.update(state_dict=3),
    ],
    "`{}` was not written by bnnify": [lambda c: c.update(bnnify="nothing")],
    "unexpected: training.weight": [lambda c: c["state_dict"].update({"training.weight": torch.zeros(2)})],
}


@pytest.mark.parametrize("said", DAMAGES)
def test_a_damaged_file_is_refused_in_one_line(said, tmp_path):
    path = tmp_path / "x.pt"
    for change in DAMAGES[said]:
        bnnify.save(bnnify.convert(network()), path)
        tampered(path, change)
        with pytest.raises(bnnify.CheckpointError) as error:
            bnnify.load(path, network())
        assert said.format(path) in str(error.value)
        assert "\n" not in str(error.value)


def as_format_1(content, scales):
    content["bnnify"] = {"format": 1, "bnnify": "0.1.0", "torch": "2.12.0", "settings": content["bnnify"]["settings"]}


def as_format_2(content, scales):
    content["bnnify"]["format"] = 2
    settings = content["bnnify"]["settings"]
    content["bnnify"]["settings"] = {n: each | {"initial_std": scales[n].item()} for n, each in settings.items()}


@pytest.mark.parametrize("model", [None, network], ids=["alone", "with its model"])
@pytest.mark.parametrize(("earlier", "posterior_std"), [(as_format_1, 0.03), (as_format_2, 0.03), (as_format_2, None)])
def test_files_of_earlier_formats_without_the_scale_of_the_prior_still_load(earlier, posterior_std, model, tmp_path):
    path = tmp_path / "x.pt"
    bnn = bnnify.convert(network(), **({} if posterior_std is None else {"posterior_std": posterior_std}))
    with torch.no_grad():
        bnn.module[0].weight_rho.add_(1.0)
        bnn.module[3].weight_initial_std.mul_(2.0)  # known to the file alone
    bnnify.save(bnn, path)
    if earlier is as_format_1:
        with torch.no_grad():
            bnn.module[3].weight_initial_std.div_(2.0)

    def change(content):
        state = content["state_dict"]
        scales = {n.removesuffix("_initial_std"): state.pop(n) for n in list(state) if n.endswith("_initial_std")}
        assert len(scales) == 4
        earlier(content, scales)

    tampered(path, change)
    if model is not None:
        torch.testing.assert_close(bnnify.load(path, model()).kl(), bnn.kl())
    elif earlier is as_format_2:  # what format 1 lacks follows from the model
        torch.testing.assert_close(posterior_file.open_posterior(path).parameters_alone().kl(), bnn.kl())


# Names and models of every kind


def layers_named(*names):
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(2, 2) for name in names})


NAMES = [
    (lambda: layers_named("stage[0]", "stage0"), "stage[0]"),
    (lambda: layers_named("head*", "head_aux"), "head*"),
    (lambda: layers_named("a?", "ab"), "a?"),
    (lambda: layers_named("[", "b"), "["),
]


@ENDINGS
def test_names_with_special_characters_save_and_load_exactly(ending, tmp_path):
    if ending == ".safetensors":
        pytest.importorskip("safetensors")
    for build, chosen in NAMES:
        bnn = bnnify.convert(build(), select=lambda name, module, chosen=chosen: name == chosen)
        bnnify.save(bnn, tmp_path / f"x{ending}")
        loaded = bnnify.load(tmp_path / f"x{ending}", build())
        for each in (bnn, loaded):
            assert [e.name for e in each.report.bayesian] == [f"{chosen}.weight", f"{chosen}.bias"]
        assert loaded.state_dict().keys() == bnn.state_dict().keys()


def test_keys_of_a_parameter_dict_save_and_load(tmp_path):
    model = nn.ParameterDict({"a[0]": torch.ones(2, 2), "a0": torch.ones(2, 2)})
    bnn = bnnify.convert(model, select="a[0]")  # as a glob it means a0, and as a name itself
    bnnify.save(bnn, tmp_path / "x.pt")
    loaded = bnnify.load(tmp_path / "x.pt", model)
    assert {entry.name for entry in loaded.report.bayesian} == {"a[0]", "a0"}


def test_the_model_to_load_into_may_be_converted_already_in_any_way(tmp_path):
    bnn = bnnify.convert(network(), prior=bnnify.Gaussian(std=0.3), posterior_std=0.05)
    bnnify.save(bnn, tmp_path / "x.pt")
    other = bnnify.convert(network(), select="3")
    for model in (other, other.module):
        loaded = bnnify.load(tmp_path / "x.pt", model)
        assert loaded.report.bayesian == bnn.report.bayesian
        assert torch.equal(loaded.kl(), bnn.kl())
    assert "Pretrained" in str(other)


def test_a_bias_that_was_done_away_with_leaves_nothing_in_the_file(tmp_path):
    bnn = bnnify.convert(nn.Linear(4, 3))
    bnn.module.bias = None
    assert not [name for name in bnn.module.state_dict() if "bias" in name]
    bnnify.save(bnn, tmp_path / "x.pt")
    loaded = bnnify.load(tmp_path / "x.pt", nn.Linear(4, 3, bias=False))
    assert torch.equal(loaded.kl(), bnn.kl())
    assert bnnify.collapse(bnn).state_dict().keys() == {"weight"}


class KeepsItsOwn(nn.Module):
    """Has an extra state, and a loader that writes into a buffer."""

    def __init__(self):
        super().__init__()
        self.layer, self.extra = nn.Linear(2, 2), 1
        self.register_buffer("scale", torch.ones(()))

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state

    def _load_from_state_dict(self, state_dict, prefix, *args):
        with torch.no_grad():
            self.scale.copy_(state_dict.pop(prefix + "scale"))
        state_dict[prefix + "scale"] = self.scale
        super()._load_from_state_dict(state_dict, prefix, *args)


def test_weights_that_do_not_fit_leave_nothing_behind_in_modules_with_loaders_of_their_own():
    model = KeepsItsOwn()
    bnn = bnnify.convert(model)
    model.extra, model.scale = 7, torch.tensor(5.0)
    with pytest.raises(bnnify.CheckpointError, match="Nothing was loaded"):
        bnnify.load_weights(bnn, model.state_dict() | {"layer.weight": torch.zeros(3, 3)})
    assert (bnn.module.extra, bnn.module.scale.item()) == (1, 1.0)


def test_integers_may_be_weights():
    bnn = bnnify.convert(nn.Linear(3, 4))
    bnnify.load_weights(bnn, {"weight": torch.ones(4, 3), "bias": torch.ones(4, dtype=torch.int64)})
    assert torch.equal(bnn.module.bias, torch.ones(4))


def test_settings_that_are_alike_are_one_object_whatever_the_layers_are():
    bnn = bnnify.convert(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 40), nn.Conv1d(4, 5, 2)))
    data = settings_as_data({parameter.name: parameter.settings for parameter in bayesian_parameters(bnn.module)})
    assert len(data) == 6
    assert len({id(each) for each in data.values()}) == 1


def test_a_name_that_promises_another_format_is_refused_before_anything_is_written(tmp_path):
    for name in "model.onnx", "model.NPZ":
        with pytest.raises(bnnify.CheckpointError, match=r"ends in \.pt or \.safetensors, not in \."):
            bnnify.save(bnnify.convert(nn.Linear(2, 2)), tmp_path / name)
    assert not list(tmp_path.iterdir())
