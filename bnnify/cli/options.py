"""Options that several commands have."""

__all__ = ["add_data", "add_file", "add_model", "add_output", "model_of"]

import argparse
from pathlib import Path
from typing import Any

from torch import nn

from .arguments import factory, json_object, key_or_index, names, numbers, positive
from .meaning import LIKELIHOODS


def add_file(parser: argparse.ArgumentParser) -> None:
    """Add the file of a converted model that a command reads."""
    parser.add_argument("file", type=Path, help="a file that bnnify wrote")


def add_model(parser: argparse.ArgumentParser, default: str = "the file says how to make it") -> Any:
    """Add the options that say what makes the model, as a group to which others may be added."""
    group = parser.add_argument_group("the model", f"By default {default}.")
    group.add_argument("--model", metavar="MODULE:NAME", help="what makes the model, as package.module:factory")
    group.add_argument("--model-args", metavar="JSON", type=json_object, default={}, help="its keyword arguments")
    return group


def add_output(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the options that say where to write."""
    parser.add_argument("-o", "--output", type=Path, help=f"the file to write; default: {default}")
    parser.add_argument("--force", action="store_true", help="write over an existing file")


def add_data(parser: argparse.ArgumentParser, num_samples: int, required: bool = True) -> Any:
    """Add the options on data, on what the output means and on how to run, and return the group on data."""
    data = parser.add_argument_group(
        "the data",
        "A folder with a folder of images for each class; .csv, .tsv or .parquet with numbers, or with paths of images "
        "and labels; .npz; .jsonl with texts; or package.module:make_loader. What is said here is written into the "
        "file, and the next command need not be told again.",
    )
    data.add_argument("--data", required=required, help="what to read, see above")
    data.add_argument("--target", metavar="COLUMN", help="the column or array of the target; default: label, y, …")
    data.add_argument("--text", metavar="KEY", help="the key of the text; default: text, sentence, …")
    data.add_argument("--tokenizer", type=Path, metavar="DIR", help="default: the directory that was converted")
    data.add_argument("--classes", type=names, metavar="A,B,…", help="their names in the order of the outputs")
    data.add_argument("--size", type=int, help="the side of the images; default: the architecture's preset, printed")
    data.add_argument("--mean", type=numbers, metavar="R,G,B", help="what is subtracted from pixels from 0 to 1")
    data.add_argument("--std", type=numbers, metavar="R,G,B", help="what they are divided by then")
    meaning = parser.add_argument_group("the output of the network")
    meaning.add_argument(
        "--likelihood",
        choices=LIKELIHOODS,
        metavar="NAME",
        help=f"what it means: {', '.join(LIKELIHOODS)}; default: what the data suggest",
    )
    meaning.add_argument("--noise", type=float, metavar="STD", help="of a regression: the std of the data's noise")
    meaning.add_argument("--output-part", type=key_or_index, metavar="KEY", help="which part of it, a key or an index")
    meaning.add_argument("--class-dim", type=int, metavar="DIM", help="the dimension of the classes; default: the last")
    how = parser.add_argument_group("how to run")
    networks = f"the number of networks; default: {num_samples}"
    how.add_argument("-n", "--num-samples", type=positive, default=num_samples, help=networks)
    how.add_argument("--batch-size", type=positive, default=32, help="default: 32")
    how.add_argument("--device", help="such as cuda or cpu; default: cuda where there is one")
    how.add_argument("--seed", type=int, default=0, help="of all random numbers; default: 0")
    add_model(parser)
    return data


def model_of(options: argparse.Namespace) -> nn.Module | None:
    """Make the model that the command line says; None if it says none."""
    return factory(options.model, options.model_args)() if options.model else None
