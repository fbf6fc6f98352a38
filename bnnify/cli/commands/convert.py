"""``bnnify-cli convert``: make the model in a checkpoint Bayesian."""

__all__ = ["EXAMPLES", "HELP", "add_options", "run"]

import argparse
from pathlib import Path
from typing import Any

from ...checkpoints.atomic import check_new_folder
from ...checkpoints.convert_checkpoint import convert_checkpoint
from ...checkpoints.foreign.shards import as_bytes
from ...checkpoints.int8 import DTYPES
from ...checkpoints.kinds import POSTERIORS
from ...checkpoints.save_load import save
from ...draws.estimators import ESTIMATORS
from ..arguments import estimator, factory, merged, posterior, prior, setting, std
from ..history import entry
from ..options import add_model, add_output
from ..outputs import check_weights_output
from ..screen import Screen

HELP = "convert a checkpoint, whatever wrote it"
EXAMPLES = """examples:
  bnnify-cli convert resnet18.pt
  bnnify-cli convert model.safetensors --std 'Relative(0.1)' --exclude 'fc.*'
  bnnify-cli convert my-lora --base SmolLM2-135M
  bnnify-cli convert mine.ckpt --model package.module:factory \\
                               --model-args '{"width": 64}'
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what ``convert`` takes."""
    parser.add_argument("checkpoint", type=Path, help="a file of weights, or a Hugging Face model or adapter directory")
    add_output(parser, "name.bnn.pt beside the checkpoint; a name in .safetensors gives that format")
    model = add_model(parser, "the architecture is recognised by its tensors")
    model.add_argument("--base", type=Path, metavar="DIR", help="the directory of the model that a LoRA adapter is for")
    model.add_argument("--key", help="where the state_dict stands in the file, if it holds several")
    model.add_argument("--trust", action="store_true", help="unpickle freely: runs whatever code the file names")
    how = parser.add_argument_group(
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
    parser.add_argument("--dtype", choices=DTYPES, help="write two bytes for a weight, with a small error")
    parser.add_argument("--max-shard-size", metavar="SIZE", help="write a folder of shards, such as 5GB, and an index")
    parser.add_argument("--dry-run", action="store_true", help="show the report and write nothing")


def run(options: argparse.Namespace, screen: Screen) -> dict[str, Any]:
    """Convert, and write the file unless it is a dry run."""
    source = options.checkpoint
    folder = source.resolve()  # whose name may have a dot, as that of a version
    shard_size = None if options.max_shard_size is None else as_bytes(options.max_shard_size)
    ending = ".bnn.pt" if shard_size is None else ".bnn"
    default = folder.with_name(folder.name + ending) if source.is_dir() else source.with_suffix(ending)
    output = options.output or default
    if not options.dry_run and shard_size is None:
        check_weights_output(output, options.force, source)
    elif not options.dry_run:
        check_new_folder(output)
    settings = {
        "prior": options.prior,
        "posterior_std": options.std,
        "posterior": options.posterior,
        "estimator": options.estimator,
    }
    given = {name: merged(values) for name, values in settings.items() if values}
    bnn = convert_checkpoint(
        source,
        factory(options.model, options.model_args) if options.model else None,
        base=options.base,
        key=options.key,
        trust=options.trust,
        for_writing=True,
        select=options.select,
        exclude=options.exclude or (),
        strict=options.strict,
        **given,
    )
    recipe, notes = bnn.origin.recipe, bnn.origin.notes
    if recipe is not None:
        screen.report(f"recognised: {recipe}")
    for note in notes:
        screen.report(f"note: {note}")
    screen.report(bnn.report)
    if not options.dry_run:
        told = {"checkpoint": str(source), "model": options.model}
        told |= {"select": options.select, "exclude": options.exclude, "dtype": options.dtype}
        told |= {name: str(value) for name, value in given.items()}
        bnn.history.append(entry("convert", told, {}))
        save(bnn, output, dtype=options.dtype, max_shard_size=shard_size)
        screen.note(f"wrote {output}")
    return {
        "output": None if options.dry_run else output,
        "model": str(bnn.origin) or None,
        "notes": notes,
        "parameters": len(bnn.report.entries),
        "report": str(bnn.report),
    }
