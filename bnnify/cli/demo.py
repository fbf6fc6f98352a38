"""``bnnify-cli demo``: a small network on handwritten digits, before and after, and what it is unsure of."""

__all__ = ["Digits", "certain", "demo", "fine_tune", "load_digits", "make_network", "one_thread"]

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..analysis.plots import pyplot, save_figure
from ..convert import convert
from ..distributions.priors import Gaussian
from ..errors import needing
from ..model import BayesianModel
from ..prediction.averages import Prediction
from ..training.elbo import elbo
from ..training.response_std import ResponseStd

EPOCHS, BATCH_SIZE, SEEDS, SAMPLES, NOISE = 50, 50, 5, 16, 300
COLUMNS = "acc. %", "NLL", "ECE", "surest %", "AUROC %"


@dataclass(frozen=True)
class Digits:
    """Images of shape (N, 1, 8, 8) from 0 to 1, and their labels, shape (N,)."""

    images: Tensor
    labels: Tensor


def demo(picture: Path | None = None, quiet: bool = False) -> list[dict[str, Any]]:
    """Convert a pretrained network, fine-tune it, and print how good its probabilities are and what it is unsure of.

    All of it is done with five seeds, beside the same fine-tuning without a posterior.

    Args:
        picture: Where to draw the digits of which the network is most and least sure. Default: none.
        quiet: Print nothing.

    Returns:
        The figures of each row of the table.

    Raises:
        MissingLibraryError: A library that only the demo needs is not installed.
    """
    with needing("rich torchmetrics", "The demo"):
        from rich.console import Console
        from rich.progress import Progress
        from rich.table import Table
        from torchmetrics.functional.classification import binary_auroc, multiclass_calibration_error
    if picture is not None:
        pyplot()  # rather now than after the training
    network, train, test = load_digits()
    noise = torch.rand(NOISE, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    unknown = torch.cat([torch.zeros(len(test.labels)), torch.ones(NOISE)]).long()

    def figures(predict: Callable[[Tensor], Prediction]) -> list[float]:
        digits = predict(test.images)
        right = digits.mean.argmax(1) == test.labels
        entropy, of_noise = (torch.special.entr(each.mean).sum(1) for each in (digits, predict(noise)))
        surest = entropy.argsort()[: int(0.9 * len(entropy))]
        return [
            100 * right.double().mean().item(),
            F.nll_loss(digits.mean.clamp_min(1e-12).log(), test.labels).item(),
            multiclass_calibration_error(digits.mean, test.labels, digits.mean.shape[1], 15).item(),
            100 * right[surest].double().mean().item(),
            100 * binary_auroc(torch.cat([entropy, of_noise]), unknown).item(),
        ]

    found: dict[str, list[list[float]]] = {"as trained": [figures(partial(certain, network))]}
    # A bar on a terminal only: in a file or a pipe it would be noise.
    bar = Progress(console=Console(stderr=True), disable=quiet or not sys.stderr.isatty(), transient=True)
    with one_thread(), bar as progress:
        task = progress.add_task(f"fine-tuning, {SEEDS} seeds", total=2 * SEEDS * EPOCHS)
        for seed in range(SEEDS):
            torch.manual_seed(seed)
            plain = copy.deepcopy(network)
            fine_tune(plain, train, lambda: progress.advance(task))
            bnn = convert(network, prior=Gaussian(std=1.0), posterior_std=ResponseStd(train.images, 0.1))
            predicted = partial(bnn.predict, num_samples=SAMPLES, likelihood="logits")
            rows = {"trained longer": figures(partial(certain, plain.eval())), "converted": figures(predicted)}
            fine_tune(bnn, train, lambda: progress.advance(task))
            rows["fine-tuned"] = figures(predicted)
            for name, row in rows.items():
                found.setdefault(name, []).append(row)
    if not quiet:
        table = Table(
            title=f"handwritten digits: {len(test.images)} that the network has not seen",
            caption=f"± over {SEEDS} seeds; NLL in nats; surest: accuracy on the nine tenths of which the "
            "network is surest; AUROC: how well its entropy tells noise from digits",
        )
        table.add_column("network", no_wrap=True)
        for heading in COLUMNS:
            table.add_column(heading, justify="right", no_wrap=True)
        for name, runs in found.items():
            table.add_row(name, *map(_told, zip(*runs, strict=True), (1, 3, 3, 1, 1)))
        Console().print(table)
    if picture is not None:
        _draw(picture, test, predicted(test.images))
    means = {name: map(mean, zip(*runs, strict=True)) for name, runs in found.items()}
    return [{"network": name} | dict(zip(COLUMNS, values, strict=True)) for name, values in means.items()]


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread: layers this small gain nothing from more, and on a busy machine wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _told(values: Sequence[float], digits: int) -> str:
    spread = f"±{stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def load_digits() -> tuple[nn.Module, Digits, Digits]:
    """Load the pretrained network, the digits that it was trained on, and those for testing."""
    with (files("bnnify") / "data" / "digits.pt").open("rb") as file:
        content = torch.load(file, weights_only=True)
    network = make_network()
    network.load_state_dict(content["network"])
    digits = Digits(content["images"].view(-1, 1, 8, 8).float() / 16, content["labels"].long())
    train, test = (
        Digits(digits.images[part], digits.labels[part])
        for part in (slice(None, content["seen"]), slice(content["test"], None))
    )
    return network.eval(), train, test


def make_network() -> nn.Sequential:
    """Make a small convolutional network for digits of 8×8 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(384, 24),
        nn.ReLU(),
        nn.Linear(24, 10),
    )


def fine_tune(network: nn.Module, train: Digits, after_epoch: Callable[[], object]) -> None:
    """Train with Adam at a learning rate that falls to zero: by the ELBO if ``network`` is a converted one."""
    if isinstance(network, BayesianModel):
        optimizer = torch.optim.Adam(network.parameter_groups(lr=3e-3, rho_lr=1e-2))
    else:
        optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    network.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(train.labels)).split(BATCH_SIZE):
            output = network(train.images[batch])
            logits, kl = output if isinstance(output, tuple) else (output, torch.zeros(()))
            optimizer.zero_grad()
            elbo(F.cross_entropy(logits, train.labels[batch]), kl, num_data=len(train.labels)).backward()
            optimizer.step()
        schedule.step()
        after_epoch()


def certain(network: nn.Module, images: Tensor) -> Prediction:
    """Make the prediction of a network without a posterior: all of its entropy is within the one network."""
    with torch.no_grad():
        probabilities = network(images).softmax(1)
    entropy = torch.special.entr(probabilities).sum(1)
    return Prediction(probabilities, torch.zeros_like(probabilities), 1, entropy, entropy)


def _draw(path: Path, test: Digits, prediction: Prediction) -> None:
    plt = pyplot()
    order = torch.special.entr(prediction.mean).sum(1).argsort()
    figure, rows = plt.subplots(2, 8, figsize=(10, 3.4), layout="constrained")
    for row, name, chosen in zip(rows, ("most sure", "least sure"), (order[:8], order[-8:]), strict=True):
        for axes, index in zip(row, chosen.tolist(), strict=True):
            axes.imshow(test.images[index, 0], cmap="gray_r")
            guess, truth = prediction.mean[index].argmax().item(), test.labels[index].item()
            axes.set_title(f"{guess} ({prediction.mean[index].max():.0%}), is {truth}", fontsize="small")
            axes.set_axis_off()
        row[0].set_axis_on()
        row[0].set(xticks=[], yticks=[], ylabel=name)
    save_figure(figure, path)
