"""What a GPU does in a way of its own: its random numbers, its graphs, its queue of work, two devices in one model."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import bnnify
from benchmarks.harness.recorded import Recorded
from bnnify.draws.noise import noise_like
from bnnify.modules.parameters import unique_bayesian_parameters
from tests import zoo
from tests.contract import CHECKS, Case, examine

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")

DEVICE = torch.device("cuda")


@pytest.fixture(autouse=True)
def exact():
    """The same sums in the same order whenever a layer is called, as the promises have them on a CPU."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = before


def mlp(*widths: int) -> nn.Module:
    layers = [nn.Sequential(nn.Linear(n, m), nn.ReLU()) for n, m in itertools.pairwise(widths)]
    return nn.Sequential(*layers[:-1], layers[-1][0])


def on_gpu(tensors: tuple) -> tuple:
    return tuple(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in tensors)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_every_promise_is_kept(name):
    case = Case(
        name,
        lambda: zoo.build(name)[0].to(DEVICE),
        lambda model: (on_gpu(zoo.build(name)[1]), {}),
        settings={"prior": bnnify.Pretrained()},
    )
    found = list(examine(case))
    assert {outcome.check: outcome.detail for outcome in found if outcome.status != "pass"} == {}
    assert {outcome.check for outcome in found} == {"original", *CHECKS}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
def test_noise_is_standard_normal(layout):
    noise = noise_like(torch.empty(64, 128, 16, 16, device=DEVICE).contiguous(memory_format=layout)).double()
    n = noise.numel()
    assert abs(noise.mean()) < 4 / n**0.5
    assert abs(noise.square().mean() - 1) < 4 * (2 / n) ** 0.5
    assert abs(noise.pow(4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert abs((noise[:, 1:] * noise[:, :-1]).mean()) < 4 / n**0.5


def test_sample_and_kl_and_their_gradients_are_those_of_a_cpu():
    """At every σ from the smallest that float32 holds, where a CPU looks first how small they are."""
    torch.manual_seed(0)
    mean = torch.randn(4096)
    rho = torch.linspace(-100.0, 20.0, 4096)
    for prior in (bnnify.Gaussian(std=0.5), bnnify.Pretrained(std=0.1)):
        found = []
        for device in ("cpu", "cuda"):
            torch.manual_seed(1)
            model = bnnify.convert(nn.Linear(64, 64, bias=False), prior=prior).to(device)
            with torch.no_grad():
                model.module.weight.copy_(mean.view(64, 64))
                model.module.weight_rho.copy_(rho.view(64, 64))
            model.kl().backward()
            found.append([model.kl().detach().cpu(), *(p.grad.cpu() for p in model.parameters() if p.requires_grad)])
        for cpu, gpu in zip(*found, strict=True):
            torch.testing.assert_close(gpu, cpu, rtol=1e-4, atol=1e-5)


def test_a_training_step_never_waits_for_the_gpu():
    bnn = bnnify.convert(mlp(20, 32, 32, 5).to(DEVICE))
    optimizer = torch.optim.Adam(bnn.parameter_groups(lr=1e-3, rho_lr=1e-2), fused=True)
    x, y = torch.randn(16, 20, device=DEVICE), torch.randint(5, (16,), device=DEVICE)

    def step() -> None:
        optimizer.zero_grad()
        output, kl = bnn(x)
        bnnify.elbo(F.cross_entropy(output, y), kl, num_data=100).backward()
        optimizer.step()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("prior", [bnnify.Pretrained(), bnnify.Gaussian(std=0.1), bnnify.ScaleMixture()])
def test_a_recorded_step_trains_as_the_step_itself_does_with_fresh_noise_in_each(prior):
    torch.manual_seed(0)
    plain = mlp(20, 64, 64, 5)
    batches = [(torch.randn(16, 20, device=DEVICE), torch.randint(5, (16,), device=DEVICE)) for _ in range(12)]
    trained, losses = [], []
    for recorded in (False, True):
        bnn = bnnify.convert(copy.deepcopy(plain), prior=prior, posterior_std=0.1).to(DEVICE)
        optimizer = torch.optim.Adam(bnn.parameters(), torch.tensor(1e-2, device=DEVICE), fused=True, capturable=True)
        last = torch.zeros((), device=DEVICE)

        def step(x, y, bnn=bnn, optimizer=optimizer, last=last):
            optimizer.zero_grad()
            output, kl = bnn(x)
            loss = bnnify.elbo(F.cross_entropy(output, y), kl, num_data=100)
            loss.backward()
            optimizer.step()
            last.copy_(loss.detach())

        call = Recorded(step) if recorded else step
        torch.manual_seed(1)
        seen = []
        for x, y in batches:
            call(x, y)
            seen.append(last.item())
        losses.append(seen)
        trained.append([parameter.detach().clone() for parameter in bnn.parameters()])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(trained[1], trained[0], rtol=1e-3, atol=1e-3)


def test_replays_of_a_recorded_forward_draw_new_networks():
    bnn = bnnify.convert(mlp(20, 64, 5).to(DEVICE), posterior_std=0.1)
    x, outputs, out = torch.randn(16, 20, device=DEVICE), [], torch.zeros(16, 5, device=DEVICE)

    @torch.no_grad()
    def forward(x):
        out.copy_(bnn(x)[0])

    call = Recorded(forward)
    for _ in range(300):
        call(x)
        outputs.append(out.clone())
    drawn = torch.stack(outputs)
    assert len(drawn.flatten(1).unique(dim=0)) == 300
    wanted = bnn.predict(x, 2000).std
    assert 0.9 < (drawn.std(0) / wanted).mean() < 1.1
    # One draw says nothing of the next.
    rest = (drawn - drawn.mean(0)) / drawn.std(0)
    assert abs((rest[1:] * rest[:-1]).mean()) < 4 / 299**0.5


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_it_draws_new_networks_of_the_same_distribution(mode):
    torch.manual_seed(0)
    bnn = bnnify.convert(mlp(20, 64, 5).to(DEVICE), posterior_std=0.1)
    x = torch.randn(16, 20, device=DEVICE)
    compiled = torch.compile(bnn, fullgraph=True, mode=mode)
    drawn, gradients = [], []
    for _ in range(300):
        bnn.zero_grad()
        output, kl = compiled(x)
        (output.square().mean() + kl / 100).backward()
        drawn.append(output.detach().clone())
        gradients.append(bnn.module[0][0].weight_rho.grad.clone())
    drawn = torch.stack(drawn)
    assert len(drawn.flatten(1).unique(dim=0)) == 300
    prediction = bnn.predict(x, 2000)
    assert 0.9 < (drawn.std(0) / prediction.std).mean() < 1.1
    assert ((drawn.mean(0) - prediction.mean).abs() < 6 * prediction.std / 300**0.5).all()
    torch.testing.assert_close(kl.detach(), bnn.kl().detach(), rtol=1e-4, atol=1e-3)
    eager = []
    for _ in range(300):
        bnn.zero_grad()
        output, kl = bnn(x)
        (output.square().mean() + kl / 100).backward()
        eager.append(bnn.module[0][0].weight_rho.grad.clone())
    found, wanted = torch.stack(gradients), torch.stack(eager)
    error = (found.var(0) / 300 + wanted.var(0) / 300).sqrt()
    assert ((found.mean(0) - wanted.mean(0)) / error).square().mean() < 1.5


@pytest.mark.parametrize("options", [{}, {"antithetic": True}, {"networks_at_once": 3}])
def test_predict_is_the_loop_over_draws(options):
    bnn = bnnify.convert(mlp(20, 32, 5).to(DEVICE), posterior_std=0.1).eval()
    x = torch.randn(16, 20, device=DEVICE)
    found = bnn.predict(x, 6, likelihood="logits", seed=3, **options)
    again = bnn.predict(x, 6, likelihood="logits", seed=3, **options)
    other = bnn.predict(x, 6, likelihood="logits", seed=4, **options)
    assert found.mean.device.type == "cuda"
    torch.testing.assert_close(found.mean, again.mean, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found.mean, other.mean)
    if not options.get("antithetic"):
        torch.manual_seed(3)
        with torch.no_grad():
            loop = []
            for _ in range(2000):
                with bnn.draw():
                    loop.append(bnn.module(x).softmax(-1))
        many = bnn.predict(x, 2000, likelihood="logits", networks_at_once=options.get("networks_at_once", 1))
        spread = torch.stack(loop).std(0)
        assert ((many.mean - torch.stack(loop).mean(0)).abs() < 6 * spread * (2 / 2000) ** 0.5 + 1e-5).all()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("estimator", ["reparameterization", "local", "flipout"])
def test_a_checkpointed_forward_has_the_gradients_of_a_plain_one(estimator, use_reentrant):
    torch.manual_seed(0)
    plain, x = mlp(20, 32, 5).to(DEVICE), torch.randn(16, 20, device=DEVICE, requires_grad=True)

    def gradients(checkpointed):
        bnn = bnnify.convert(plain, estimator=estimator, posterior_std=0.1)
        torch.manual_seed(1)
        output = checkpoint(lambda x: bnn(x)[0], x, use_reentrant=use_reentrant) if checkpointed else bnn(x)[0]
        output.square().sum().backward()
        return [p.grad for p in bnn.parameters() if p.grad is not None]

    torch.testing.assert_close(gradients(True), gradients(False), rtol=1e-4, atol=1e-4)


def test_layers_of_one_model_may_lie_on_two_devices():
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 3).to(DEVICE)

        def forward(self, x):
            return self.second(self.first(x).relu().to(DEVICE))

    bnn = bnnify.convert(Split())
    x = torch.randn(4, 8)
    output, kl = bnn(x)
    (output.sum() + kl.to(DEVICE)).backward()
    assert all(p.grad is not None and p.grad.device == p.device for p in bnn.parameters() if p.requires_grad)
    assert bnn.predict(x, 3).mean.device.type == "cuda"
    whole = sum(p.kl().item() for p in unique_bayesian_parameters(bnn))
    assert kl.item() == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast_the_kl_stays_in_float32_and_training_goes_on(dtype):
    bnn = bnnify.convert(mlp(20, 64, 5).to(DEVICE), posterior_std=0.05)
    optimizer = torch.optim.Adam(bnn.parameter_groups(lr=1e-3, rho_lr=1e-2))
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    x = torch.randn(64, 20, device=DEVICE)
    y = x[:, :5].argmax(1)
    seen = []
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype):
            output, kl = bnn(x)
            loss = bnnify.elbo(F.cross_entropy(output, y), kl, num_data=64)
        assert (output.dtype, kl.dtype) == (dtype, torch.float32)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        seen.append(loss.item())
    assert seen[-1] < seen[0]
    assert all(p.isfinite().all() for p in bnn.parameters())
    torch.testing.assert_close(kl.detach(), bnn.kl().detach(), rtol=0.05, atol=1.0)


def test_a_file_goes_from_the_gpu_to_a_cpu_and_back(tmp_path):
    plain = mlp(20, 32, 5)
    bnn = bnnify.convert(copy.deepcopy(plain).to(DEVICE))
    bnnify.save(bnn, tmp_path / "on_gpu.bnn.pt")
    on_cpu = bnnify.load(tmp_path / "on_gpu.bnn.pt", mlp(20, 32, 5))
    assert {p.device.type for p in on_cpu.parameters()} == {"cpu"}
    bnnify.save(on_cpu, tmp_path / "on_cpu.bnn.pt")
    back = bnnify.load(tmp_path / "on_cpu.bnn.pt", mlp(20, 32, 5).to(DEVICE))
    for one, other in zip(bnn.state_dict().values(), back.state_dict().values(), strict=True):
        assert one.device == other.device
        assert torch.equal(one, other)
    collapsed = bnnify.collapse(back).state_dict()
    assert all(torch.equal(value, collapsed[name].cpu()) for name, value in plain.state_dict().items())


def test_tune_std_finds_the_factor_of_a_cpu():
    torch.manual_seed(0)
    plain = mlp(20, 64, 5)
    with torch.no_grad():
        plain[1].weight.mul_(12)
    x = torch.randn(256, 20)
    y = plain(x).argmax(1)
    y[::4] = torch.randint(5, y[::4].shape)
    factors = []
    for device in ("cpu", "cuda"):
        bnn = bnnify.convert(copy.deepcopy(plain).to(device))
        tuned = bnnify.tune_std(bnn, [(x.to(device), y.to(device))], likelihood="logits", num_samples=64)
        factors.append(tuned.factor)
    assert 0.7 < factors[0] / factors[1] < 1.4
