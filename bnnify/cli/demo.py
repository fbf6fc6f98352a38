"""``bnnify-cli demo``: a small network on handwritten digits, before and after, and what it is unsure of."""

__all__ = ["demo"]

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..analysis.plots import pyplot
from ..convert import convert
from ..errors import needing
from ..model import BayesianModel
from ..prediction.averages import Prediction
from ..training.elbo import elbo
from ..training.response_std import ResponseStd

EPOCHS, BATCH_SIZE = 20, 100


@dataclass(frozen=True)
class Digits:
    """Images of shape (N, 1, 8, 8) from 0 to 1, and their labels, shape (N,)."""

    images: Tensor
    labels: Tensor


def demo(picture: Path | None = None, quiet: bool = False) -> list[dict[str, Any]]:
    """Convert a pretrained network, fine-tune it, and print how good its probabilities are and what it is unsure of.

    Args:
        picture: Where to draw the digits and the noise of which the network is most and least sure. Default: none.
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
        from torchmetrics.functional.classification import multiclass_calibration_error
    if picture is not None:
        pyplot()  # rather now than after the training
    torch.manual_seed(0)
    network, train, test = load_digits()
    noise = torch.rand(len(test.images), 1, 8, 8)

    table = Table(
        title=f"handwritten digits: {len(test.images)} that the network has not seen",
        caption="H: entropy of the prediction, MI: what the drawn networks disagree on, both in nats",
    )
    table.add_column("network", no_wrap=True)
    for heading in ("acc.", "NLL", "ECE", "H: digits", "noise", "MI: digits", "noise"):
        table.add_column(heading, justify="right")

    rows: list[dict[str, Any]] = []

    def add_row(name: str, predict: Callable[[Tensor], Prediction]) -> Prediction:
        digits, unknown = predict(test.images), predict(noise)
        accuracy = (digits.mean.argmax(1) == test.labels).double().mean().item()
        nll = F.nll_loss(digits.mean.clamp_min(1e-12).log(), test.labels).item()
        ece = multiclass_calibration_error(digits.mean, test.labels, digits.mean.shape[1], 15).item()
        rows.append({"network": name, "accuracy": accuracy, "nll": nll, "ece": ece})
        table.add_row(
            name,
            f"{accuracy:.1%}",
            f"{nll:.3f}",
            f"{ece:.3f}",
            *(_mean(prediction.predictive_entropy) for prediction in (digits, unknown)),
            *(_mean(prediction.mutual_information) for prediction in (digits, unknown)),
        )
        return digits

    bnn = convert(network, posterior_std=ResponseStd(train.images, 0.1))
    add_row("as it was trained", lambda images: certain(network, images))
    add_row("converted", lambda images: bnn.predict(images, likelihood="logits"))
    # A bar on a terminal only: in a file or a pipe it would be noise.
    with Progress(console=Console(stderr=True), disable=quiet or not sys.stderr.isatty(), transient=True) as progress:
        task = progress.add_task("fine-tuning by the ELBO", total=EPOCHS)
        fine_tune(bnn, train, lambda: progress.advance(task))
    prediction = add_row("fine-tuned", lambda images: bnn.predict(images, likelihood="logits"))
    if not quiet:
        Console().print(table)
    if picture is not None:
        _draw(picture, test, prediction)
    return rows


def _mean(nats: Tensor | None) -> str:
    return "" if nats is None else f"{nats.mean():.2f}"


def load_digits() -> tuple[nn.Module, Digits, Digits]:
    """Load the pretrained network, the digits that it was trained on, and the others."""
    with (files("bnnify") / "data" / "digits.pt").open("rb") as file:
        content = torch.load(file, weights_only=True)
    network = make_network()
    network.load_state_dict(content["network"])
    digits = Digits(content["images"].view(-1, 1, 8, 8).float() / 16, content["labels"].long())
    train, test = (
        Digits(digits.images[part], digits.labels[part])
        for part in (slice(None, content["seen"]), slice(content["seen"], None))
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


def fine_tune(bnn: BayesianModel, train: Digits, after_epoch: Callable[[], object]) -> None:
    """Minimise the negative ELBO with Adam, at a learning rate that falls to zero."""
    optimizer = torch.optim.Adam(bnn.parameter_groups(lr=3e-3, rho_lr=1e-2))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    bnn.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(train.labels)).split(BATCH_SIZE):
            logits, kl = bnn(train.images[batch])
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
    figure.savefig(path)
    plt.close(figure)
