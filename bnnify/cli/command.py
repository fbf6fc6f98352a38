"""The command ``bnnify-cli``: a thin face over the library."""

__all__ = ["main"]

import argparse
import dataclasses
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from ..analysis.pruning import prune
from ..analysis.summary import QUANTILES, ParameterSummary, print_table, summarize
from ..checkpoints.convert_checkpoint import convert_checkpoint
from ..checkpoints.foreign.layout import Layout
from ..checkpoints.foreign.read_write import write
from ..checkpoints.own_format import open_posterior, write_posterior
from ..checkpoints.posterior_file import PosteriorFile
from ..checkpoints.save_load import load, save
from ..deployment.export import export
from ..errors import BnnifyError, CheckpointError
from .arguments import example_inputs, factory, merged
from .parser import make_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: The command line without the program's name. Default: ``None``, that of the process.

    Returns:
        The exit status: 0, or 1 after an error, which is one line on standard error. A wrong command line exits with 2.
    """
    commands = {
        "convert": _convert,
        "inspect": _inspect,
        "collapse": _collapse,
        "prune": _prune,
        "export": _export,
        "demo": _demo,
    }
    options = make_parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            if not options.debug:
                warnings.simplefilter("ignore")
            commands[options.command](options)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return _complain("interrupted; nothing was written")
    except Exception as error:
        if options.debug:
            raise
        known = isinstance(error, BnnifyError)
        text = str(error) if known else f"{type(error).__name__}: {error} (--debug shows where)"
        return _complain(" ".join(text.split()))
    return 0


def _complain(text: str) -> int:
    print(f"bnnify-cli: {text}", file=sys.stderr)
    return 1


def _convert(options: argparse.Namespace) -> None:
    source = options.checkpoint
    folder = source.resolve()  # whose name may have a dot, as that of a version
    default = folder.with_name(folder.name + ".bnn.pt") if source.is_dir() else source.with_suffix(".bnn.pt")
    output = options.output or default
    if not options.dry_run:
        _check_output(output, options.checkpoint, options.force)
    settings = {
        "prior": options.prior,
        "posterior_std": options.std,
        "posterior": options.posterior,
        "estimator": options.estimator,
    }
    bnn = convert_checkpoint(
        options.checkpoint,
        factory(options.model, options.model_args) if options.model else None,
        base=options.base,
        key=options.key,
        trust=options.trust,
        for_writing=True,
        select=options.select,
        exclude=options.exclude or (),
        strict=options.strict,
        **{name: merged(given) for name, given in settings.items() if given},
    )
    if not options.quiet:
        recognised = () if bnn.origin.recipe is None else (f"recognised: {bnn.origin.recipe}",)
        print(*recognised, *(f"note: {note}" for note in bnn.origin.notes), bnn.report, sep="\n")
    if not options.dry_run:
        save(bnn, output, dtype=options.dtype)
        _say(options, f"wrote {output}")


def _inspect(options: argparse.Namespace) -> None:
    file = open_posterior(options.file)
    bnn = file.parameters_alone()
    summaries = summarize(bnn)
    if options.plot:
        from ..analysis.plots import plot_signal_to_noise

        plot_signal_to_noise(bnn, options.plot)
    if options.json:
        print(json.dumps(_as_json(file, summaries), indent=2))
    elif not options.quiet:
        print_table(summaries, ", ".join(filter(None, [str(file.path), str(file.origin), file.precision])))


def _collapse(options: argparse.Namespace) -> None:
    file = open_posterior(options.file)
    layout = file.origin.layout or Layout("torch")
    ending = ".collapsed.safetensors" if layout.kind == "safetensors" else ".collapsed.pt"
    output = options.output or _renamed(options.file, ending)
    _check_output(output, options.file, options.force)
    write(output, layout, file.plain_state_dict, file.origin.rest)
    _say(options, f"wrote {output}")


def _prune(options: argparse.Namespace) -> None:
    output = options.output or _renamed(options.file, ".pruned.bnn.pt")
    _check_output(output, options.file, options.force)
    file = open_posterior(options.file)
    report = prune(file.parameters_alone(), options.fraction, per_layer=options.per_layer)
    write_posterior(output, file.state_dict, file.settings, file.origin, file.dtype)
    if not options.quiet:
        print(report)
    _say(options, f"wrote {output}")


def _export(options: argparse.Namespace) -> None:
    _check_output(options.output, options.file, options.force)
    bnn = load(options.file, factory(options.model, options.model_args)() if options.model else None)
    torch.manual_seed(options.seed)
    with nullcontext() if options.debug else _unseen():
        found = export(
            bnn,
            options.output,
            example_inputs(options.input),
            num_samples=options.num_samples,
            likelihood=options.likelihood,
            outputs=options.outputs,
            output=options.output_part,
            class_dim=options.class_dim,
            format=options.format,
            noise=options.noise,
        )
    if not options.quiet:
        print(found)
    _say(options, f"wrote {options.output}")


@contextmanager
def _unseen() -> Iterator[None]:
    """Hide what the exporters of torch log and print beside what they raise."""
    before = logging.root.manager.disable
    logging.disable()
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _demo(options: argparse.Namespace) -> None:
    from .demo import demo

    demo(picture=options.picture, quiet=options.quiet)


def _check_output(output: Path, source: Path, force: bool) -> None:
    """Raise before the work is done, rather than after it."""
    if output.exists() and (output.is_dir() or (source.exists() and output.samefile(source))):
        raise CheckpointError(f"Cannot write `{output}`: it is {'a folder' if output.is_dir() else 'the input'}.")
    if output.exists() and not force:
        raise CheckpointError(f"`{output}` exists. Choose another name with -o, or pass --force.")
    if not output.absolute().parent.is_dir():
        raise CheckpointError(f"Cannot write `{output}`: its folder does not exist.")


def _renamed(file: Path, ending: str) -> Path:
    return file.with_name(file.name.removesuffix(".safetensors").removesuffix(".pt").removesuffix(".bnn") + ending)


def _say(options: argparse.Namespace, text: str) -> None:
    if not options.quiet:
        print(text, file=sys.stderr)


def _as_json(file: PosteriorFile, summaries: Sequence[ParameterSummary]) -> dict[str, Any]:
    return {
        "file": str(file.path),
        "model": str(file.origin) or None,
        "dtype": file.dtype,
        "error": dict(file.int8),
        "kl": sum(summary.kl for summary in summaries),
        "quantiles": QUANTILES,
        "parameters": [dataclasses.asdict(summary) for summary in summaries],
    }
