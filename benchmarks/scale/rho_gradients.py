"""Compares what DDP learns where the gradients of ρ, or all gradients, are reduced in bfloat16."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

import bnnify
from bnnify.cli.demo import load_digits

from ..harness import report
from ..harness.report import Run, Table, spread
from .llama import in_processes


class Reduced:
    """A communication hook of DDP that reduces gradients in bfloat16: of ρ, of the means, of both or of neither."""

    def __init__(self, *, rho: bool, mean: bool) -> None:
        self.rho, self.mean = rho, mean

    def sent(self, model: nn.Module, bucket: dist.GradBucket) -> tuple[list[Tensor], list[Tensor]]:
        """Return the gradients in the order in which they are sent, and what is sent."""
        rhos = {parameter for name, parameter in model.named_parameters() if name.endswith("_rho")}
        exact, short = list[Tensor](), list[Tensor]()
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            (short if (self.rho if parameter in rhos else self.mean) else exact).append(gradient)
        groups = {torch.float32: exact, torch.bfloat16: short}
        parts = [torch.cat([g.flatten() for g in group]).to(dtype) for dtype, group in groups.items() if group]
        return exact + short, parts

    def __call__(self, model: nn.Module, bucket: dist.GradBucket) -> Future[Tensor]:
        gradients, parts = self.sent(model, bucket)
        futures = [dist.all_reduce(part.div_(dist.get_world_size()), async_op=True).get_future() for part in parts]

        def put_back(_: Future[list[Future[Tensor]]]) -> Tensor:
            means = torch.cat([part.float() for part in parts]).split([gradient.numel() for gradient in gradients])
            for gradient, mean in zip(gradients, means, strict=True):
                gradient.copy_(mean.view_as(gradient))
            return bucket.buffer()

        return torch.futures.collect_all(futures).then(put_back)


HOOKS = {
    "float32": Reduced(rho=False, mean=False),
    "ρ in bfloat16": Reduced(rho=True, mean=False),
    "all in bfloat16": Reduced(rho=True, mean=True),
}


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    run = Run(options, ["torch", "bnnify"])
    found = in_processes(trained, options.seeds, options.steps)
    run.record(found)
    rows = [[hook, *(spread(values, 4) for values in zip(*runs, strict=True))] for hook, runs in found.items()]
    title = f"digits, 2 ranks, {options.seeds} seeds: mean ± standard deviation over seeds"
    run.show(Table(title, ["gradients are reduced in", "accuracy", "NLL", "rms of σ / its start"], rows))


def trained(seeds: int, steps: int) -> dict[str, list[tuple[float, float, float]]]:
    """Train on the demo's digits from its network, with each hook and seed; measure on those held out."""
    return {hook: [_trained(hook, seed, steps) for seed in range(seeds)] for hook in HOOKS}


def _trained(hook: str, seed: int, steps: int) -> tuple[float, float, float]:
    torch.manual_seed(seed)
    network, train, test = load_digits()
    bnn = bnnify.convert(network, prior=bnnify.Gaussian(std=1.0))
    start = _std(bnn)
    model = DistributedDataParallel(bnn)
    model.register_comm_hook(bnn, lambda bnn, bucket: HOOKS[hook](bnn, bucket))  # DDP takes no annotated one
    optimizer = torch.optim.Adam(bnn.parameter_groups(lr=3e-3, rho_lr=1e-2))
    order = torch.Generator().manual_seed(seed)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for _ in range(steps):
        chosen = torch.randint(len(train.images), (64,), generator=order)[rank::ranks]
        output, kl = model(train.images[chosen])
        loss = bnnify.elbo(F.cross_entropy(output, train.labels[chosen]), kl, num_data=len(train.images))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    mean = bnn.predict(test.images, 32, likelihood="logits", seed=0).mean
    accuracy = (mean.argmax(1) == test.labels).double().mean().item()
    return accuracy, F.nll_loss(mean.log(), test.labels).item(), _std(bnn) / start


def _std(bnn: bnnify.BayesianModel) -> float:
    rhos = [parameter.detach() for name, parameter in bnn.named_parameters() if name.endswith("_rho")]
    return torch.cat([F.softplus(rho).flatten() for rho in rhos]).square().mean().sqrt().item()


if __name__ == "__main__":
    main()
