"""The command ``bnnify-cli``: a thin face over the library."""

__all__ = ["main"]

import argparse
import dataclasses
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..analysis.pruning import prune
from ..analysis.summary import QUANTILES, ParameterSummary, print_table, summarize
from ..checkpoints.convert_checkpoint import convert_checkpoint
from ..checkpoints.foreign.layout import Layout
from ..checkpoints.foreign.read_write import write
from ..checkpoints.kinds import POSTERIORS
from ..checkpoints.own_format import open_posterior, write_posterior
from ..checkpoints.posterior_file import PosteriorFile
from ..checkpoints.save_load import save
from ..draws.estimators import ESTIMATORS
from ..errors import BnnifyError, CheckpointError
from .arguments import estimator, factory, json_object, merged, posterior, prior, setting, std

_EXAMPLES = {
    "convert": """examples:
  bnnify-cli convert resnet18.pt
  bnnify-cli convert model.safetensors -o model.bnn.safetensors --std 'Relative(0.1)' --exclude 'layer4.*'
  bnnify-cli convert mine.ckpt --model package.module:factory --model-args '{"width": 64}'
""",
    "inspect": """examples:
  bnnify-cli inspect resnet18.bnn.pt
  bnnify-cli inspect resnet18.bnn.pt --json | jq .kl
""",
    "collapse": """example:
  bnnify-cli collapse resnet18.bnn.pt -o resnet18-tuned.pt
""",
    "prune": """example:
  bnnify-cli prune resnet18.bnn.pt 0.75 -o resnet18-sparse.bnn.pt
""",
    "demo": """example:
  bnnify-cli demo --picture digits.png
""",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: The command line without the program's name. Default: ``None``, that of the process.

    Returns:
        The exit status: 0, or 1 after an error, which is one line on standard error. A wrong command line exits with 2.
    """
    options = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            if not options.debug:
                warnings.simplefilter("ignore")
            options.run(options)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bnnify-cli", description="Turn a trained PyTorch model into a Bayesian one.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('bnnify')}")
    _add_habits(parser, {"quiet": False, "debug": False})
    commands = parser.add_subparsers(required=True, metavar="command", title="commands")

    command = _command(commands, "convert", _convert, "convert a checkpoint, whatever wrote it")
    command.add_argument("checkpoint", type=Path, help="a file of weights, or a Hugging Face model directory")
    _add_output(command, "name.bnn.pt beside the checkpoint; a name in .safetensors gives that format")
    model = command.add_argument_group("the model", "By default the architecture is recognised by its tensors.")
    model.add_argument("--model", metavar="package.module:factory", help="what makes the model")
    model.add_argument("--model-args", metavar="JSON", type=json_object, default={}, help="its keyword arguments")
    model.add_argument("--key", help="where the state_dict stands in the file, if it holds several")
    model.add_argument("--trust", action="store_true", help="unpickle freely: runs whatever code the file names")
    how = command.add_argument_group(
        "the posterior",
        "A setting may be given per pattern, the first that fits holds: --std 'fc.*=0.01' --std 'Relative(0.1)'",
    )
    how.add_argument("--prior", action="append", type=setting(prior), help="such as 'Gaussian(std=0.1)'")
    how.add_argument("--std", action="append", type=setting(std), help="σ to start with: 0.01, 'Relative(0.1)', …")
    how.add_argument("--posterior", action="append", type=setting(posterior), help=" or ".join(POSTERIORS))
    how.add_argument("--estimator", action="append", type=setting(estimator), help=", ".join(ESTIMATORS))
    how.add_argument("--select", action="append", metavar="GLOB", help="convert these parameters or modules only")
    how.add_argument("--exclude", action="append", metavar="GLOB", help="leave these alone")
    how.add_argument("--strict", action="store_true", help="refuse a model with layers of unknown or unsupported types")
    command.add_argument("--dry-run", action="store_true", help="show the report and write nothing")

    command = _command(commands, "inspect", _inspect, "σ, signal-to-noise ratio and KL of each parameter")
    command.add_argument("file", type=Path, help="a file that bnnify wrote")
    command.add_argument("--json", action="store_true", help="as JSON")
    command.add_argument("--plot", type=Path, metavar="PNG", help="draw signal-to-noise ratios and the pruning curve")

    command = _command(commands, "collapse", _collapse, "write the posterior mean as a checkpoint like the original")
    command.add_argument("file", type=Path, help="a file that bnnify wrote")
    _add_output(command, "name.collapsed with the original's ending")

    command = _command(commands, "prune", _prune, "set the weights with the least |μ|/σ to zero")
    command.add_argument("file", type=Path, help="a file that bnnify wrote")
    command.add_argument("fraction", type=float, help="of the Bayesian weights, from 0 to 1")
    command.add_argument("--per-layer", action="store_true", help="of each parameter, rather than of all together")
    _add_output(command, "name.pruned.bnn.pt")

    command = _command(commands, "demo", _demo, "convert and fine-tune a small network that comes with bnnify")
    command.add_argument("--picture", type=Path, metavar="PNG", help="draw what the network is unsure of")
    return parser


def _command(commands: Any, name: str, run: Callable[[Any], None], description: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=description,
        description=f"{description[0].upper()}{description[1:]}.",
        epilog=_EXAMPLES[name],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_habits(command, dict.fromkeys(("quiet", "debug"), argparse.SUPPRESS))
    command.set_defaults(run=run)
    return command


def _add_habits(parser: argparse.ArgumentParser, defaults: Mapping[str, Any]) -> None:
    """The options that may stand before the command's name as well as after it."""
    quiet, debug = "print nothing but errors", "show the traceback of an error"
    parser.add_argument("-q", "--quiet", action="store_true", default=defaults["quiet"], help=quiet)
    parser.add_argument("--debug", action="store_true", default=defaults["debug"], help=debug)


def _add_output(command: argparse.ArgumentParser, default: str) -> None:
    command.add_argument("-o", "--output", type=Path, help=f"the file to write; default: {default}")
    command.add_argument("--force", action="store_true", help="write over an existing file")


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
        save(bnn, output)
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
        print_table(summaries, f"{file.path}{f', {file.origin.recipe}' if file.origin.recipe else ''}")


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
    write_posterior(output, file.state_dict, file.settings, file.origin)
    if not options.quiet:
        print(report)
    _say(options, f"wrote {output}")


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
        "model": None if file.origin.recipe is None else str(file.origin.recipe),
        "kl": sum(summary.kl for summary in summaries),
        "quantiles": QUANTILES,
        "parameters": [dataclasses.asdict(summary) for summary in summaries],
    }


if __name__ == "__main__":
    raise SystemExit(main())
