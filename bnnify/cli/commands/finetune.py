"""``bnnify-cli finetune``: train means and σ by the ELBO."""

__all__ = ["EXAMPLES", "HELP", "add_options", "run"]

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...checkpoints.save_load import save
from ...errors import ArgumentError, CheckpointError, check_positive
from ..data import Examples
from ..finetuning import FineTuning, Logs, Plan, Ranks, process_group, read_checkpoint, write_checkpoint
from ..history import entry
from ..options import add_data, add_file, add_output
from ..outputs import check_weights_output, renamed
from ..screen import Screen, about
from ..work import Work

HELP = "train by the ELBO, and keep the epoch that is best on held-out data"
EXAMPLES = """examples:
  bnnify-cli finetune resnet18.bnn.pt --data train/ --validation held-out/
  bnnify-cli finetune mine.bnn.pt --data train.csv --target y --resume
  torchrun --nproc-per-node 2 -m bnnify finetune resnet18.bnn.pt --data train/
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what ``finetune`` takes."""
    add_file(parser)
    add_output(parser, "name.finetuned.bnn.pt")
    data = add_data(parser, num_samples=4)
    held_out = data.add_mutually_exclusive_group()
    held_out.add_argument("--validation", metavar="DATA", help="held-out data, by which the best epoch is chosen")
    held_out.add_argument(
        "--hold-out", type=float, default=0.1, metavar="SHARE", help="of --data in their place; default: 0.1"
    )
    data.add_argument("--num-data", type=int, help="N, by which the KL is divided; default: the training examples")
    how = parser.add_argument_group("training")
    how.add_argument("--epochs", type=int, default=10, help="at most; default: 10")
    how.add_argument("--lr", type=float, default=1e-4, help="the learning rate of the means; default: 1e-4")
    how.add_argument("--rho-lr", type=float, default=1e-2, help="that of ρ, and of the noise; default: 1e-2")
    how.add_argument("--beta", type=float, default=1.0, help="the weight of the KL; default: 1, the ELBO")
    how.add_argument("--patience", type=int, default=3, help="stop after so many epochs without gain; default: 3")
    how.add_argument("--resume", action="store_true", help="go on from the checkpoint of an interrupted training")
    how.add_argument("--logs", type=Path, metavar="DIR", help="default: name.finetuned.logs beside the output")


def run(options: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Train, under torchrun together with the other processes, of which the first one writes."""
    output = options.output or renamed(options.file, ".finetuned.bnn.pt")
    check_weights_output(output, options.force, options.file)
    checkpoint = output.with_name(output.name + ".checkpoint")
    if checkpoint.exists() and not options.resume and not options.force:
        raise CheckpointError(f"`{checkpoint}` is left of a training. Go on from it with --resume, or pass --force.")
    for name, value in {"epochs": options.epochs, "lr": options.lr, "rho_lr": options.rho_lr}.items():
        check_positive(f"--{name.replace('_', '-')}", value, ArgumentError)
    with process_group() as ranks:
        return _train(options, screen, ranks, output, checkpoint)


def _train(options: argparse.Namespace, screen: Screen, ranks: Ranks, output: Path, checkpoint: Path) -> dict[str, Any]:
    work = Work.begin(options, screen)
    train, validation = _data(work)
    num_data = options.num_data or len(train)
    if not num_data:
        raise ArgumentError("The loader does not tell how many examples there are. Say it with --num-data.")
    if work.meaning.likelihood == "values" and work.meaning.noise_std is None:
        work.meaning = replace(work.meaning, noise_std=work.residual_std(train))
    work.describe(train)
    plan = Plan(
        options.epochs,
        options.lr,
        options.rho_lr,
        options.beta,
        options.batch_size,
        num_data,
        options.num_samples,
        options.patience,
        options.seed,
    )
    training = FineTuning(work.bnn, work.meaning, train, validation, plan, ranks)
    settings = {**vars(plan), "data": options.data, "validation": options.validation, "world_size": ranks.world_size}
    rows = []
    if options.resume:
        state = read_checkpoint(checkpoint, settings)
        rows = state.pop("rows")
        training.restore(state)
        screen.note(f"going on after epoch {training.epoch}")
    logs = Logs(options.logs or renamed(output, ".logs"), rows) if ranks.rank == 0 else None

    def remember(figures: dict[str, Any]) -> None:
        screen.note(_line(figures))
        if logs is not None:
            logs.add(figures)
            write_checkpoint(checkpoint, {**training.state(), "rows": logs.rows}, settings)

    batches = training.num_batches()
    if batches is not None:
        # A backward takes about twice as long as a forward.
        seconds = batches * work.seconds * 3 * (options.epochs - training.epoch)
        screen.note(f"fine-tuning: about {about(seconds)} for {options.epochs} epochs of {batches} batches")
    try:
        if not rows:
            remember(training.begin())
        total = None if batches is None else batches * (options.epochs - training.epoch)
        with screen.progress("fine-tuning", total) as advance:
            while not training.done:
                remember(training.step(advance))
    except KeyboardInterrupt as interrupt:
        interrupt.args = (f"interrupted in epoch {training.epoch}; the same command with --resume begins it anew",)
        raise
    finally:
        if logs is not None:
            logs.close()
    training.take_best()
    work.meaning = replace(work.meaning, noise_std=training.noise_std)
    return _finish(work, training, train, output, checkpoint)


def _data(work: Work) -> tuple[Examples, Examples]:
    options = work.options
    train = work.read(options.data)
    if options.validation is None:
        return train.split(options.hold_out, options.seed)
    return train, work.read(options.validation)


def _finish(work: Work, training: FineTuning, train: Examples, output: Path, checkpoint: Path) -> dict[str, Any]:
    """Write the model of the best epoch, and remove the checkpoint."""
    plan, screen = training.plan, work.screen
    figures = {
        "epochs": training.epoch,
        "best_epoch": training.best_epoch,
        "held_out_nll": training.best_nll,
        "kl": work.bnn.kl().item(),
        "num_data": plan.num_data,
    }
    if training.best_epoch == 0:
        screen.note("note: no epoch was better on held-out data than the model as it was, which is what is written")
    screen.report(f"best epoch {training.best_epoch} of {training.epoch}: held-out NLL {training.best_nll:.4f}")
    work.bnn.decisions.clear()  # they were fitted to other predictions
    told = work.told(train) | {name: getattr(plan, name) for name in ("lr", "rho_lr", "beta", "batch_size", "patience")}
    work.bnn.history.append(entry("finetune", told, figures))
    if training.ranks.rank == 0:
        save(work.bnn, output)
        checkpoint.unlink(missing_ok=True)
        screen.note(f"wrote {output}")
    return {"output": output, **figures}


def _line(figures: dict[str, Any]) -> str:
    parts = [f"epoch {figures['epoch']}: held-out NLL {figures['held_out_nll']:.4f}", f"KL {figures['kl']:,.0f}"]
    if figures["train_nll"] is not None:
        parts[1:1] = [f"training NLL {figures['train_nll']:.4f}"]
        parts.append(about(figures["seconds"]))
    return ", ".join(parts)
