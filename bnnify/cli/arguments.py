"""Parse what a command line says of a model and its posterior into what the library takes."""

__all__ = [
    "count",
    "estimator",
    "example_inputs",
    "factory",
    "input_tensor",
    "json_object",
    "key_or_index",
    "made_by",
    "merged",
    "names",
    "numbers",
    "positive",
    "posterior",
    "prior",
    "setting",
    "std",
]

import argparse
import ast
import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.kinds import POSTERIORS, PRIORS, STARTING_STDS
from ..distributions.initial_std import Constant, PosteriorStd
from ..distributions.prior import Prior
from ..draws.estimators import ESTIMATORS
from ..errors import ArgumentError, BnnifyError, CheckpointError
from ..modules.posterior import PosteriorFamily

_MADE = {"--model": "a model", "--data": "a loader"}
_FACTORIES = {
    "--model": "Give package.module:factory, where factory(**model_args) returns the model.",
    "--data": "Give package.module:function, where function() returns a loader.",
}


def factory(name: str, arguments: Mapping[str, Any]) -> Callable[[], nn.Module]:
    """Return a function that makes the model that ``name``, as ``package.module:factory``, and its arguments say."""
    _split_name("--model", name)

    def make() -> nn.Module:
        model = made_by("--model", name, arguments)
        if not isinstance(model, nn.Module):
            raise CheckpointError(f"--model {name} made a {type(model).__name__}, not a torch.nn.Module.")
        return model

    return make


def made_by(option: str, name: str, arguments: Mapping[str, Any]) -> Any:
    """Call what ``name``, as ``package.module:factory``, names."""
    module_name, factory_name = _split_name(option, name)
    # As with `python -m`: a module in the working directory can be named.
    sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module_name), factory_name)(**arguments)
    except Exception as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise CheckpointError(
            f"Cannot make {_MADE[option]} with {option} {name}: {type(error).__name__}: {reason}. {_FACTORIES[option]}"
        ) from error
    finally:
        sys.path.remove("")


def _split_name(option: str, name: str) -> tuple[str, str]:
    module_name, _, factory_name = name.partition(":")
    if not module_name or not factory_name:
        raise CheckpointError(f"{option} {name} does not say what makes {_MADE[option]}. {_FACTORIES[option]}")
    return module_name, factory_name


def json_object(text: str) -> dict[str, Any]:
    """Read a JSON object, the keyword arguments of a factory."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("is no JSON object such as '{\"width\": 64}'")
    return value


def input_tensor(text: str) -> tuple[str, Tensor]:
    """Make an example of an input from ``[NAME=][DTYPE:]SIZES``, such as ``2,3,224,224`` or ``ids=int64:2,16``.

    Returns:
        Its name, empty if it has none, and a tensor of normal numbers, or of zeros and ones if it holds none.
    """
    name, _, described = text.rpartition("=")
    dtype_name, _, sizes = described.rpartition(":")
    dtype = getattr(torch, dtype_name or "float32", None)
    try:
        shape = [int(size) for size in sizes.split(",")]
    except ValueError:
        shape = [0]
    if not isinstance(dtype, torch.dtype) or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"cannot read {text!r}: give [NAME=][DTYPE:]SIZES, such as ids=int64:2,16")
    made = torch.randn(shape) if dtype.is_floating_point else torch.randint(0, 2, shape)
    return name, made.to(dtype)


def example_inputs(given: Sequence[tuple[str, Tensor]]) -> Any:
    """Put inputs together: a tuple of arguments, or a mapping of keyword arguments if all have names."""
    named = {name: tensor for name, tensor in given if name}
    if named and len(named) < len(given):
        raise ArgumentError("Give each --input a name, another one each, or none of them.")
    return named or tuple(tensor for _, tensor in given)


def key_or_index(text: str) -> str | int:
    """Read which part of a model's output is meant."""
    return int(text) if text.isdecimal() else text


def names(text: str) -> tuple[str, ...]:
    """Read names with commas between them."""
    return tuple(text.split(","))


def numbers(text: str) -> tuple[float, ...]:
    """Read numbers with commas between them."""
    return tuple(float(each) for each in text.split(","))


def count(text: str) -> int:
    """Read a whole number from 0 on."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 on, not {text}")
    return value


def positive(text: str) -> int:
    """Read a whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, not {text}")
    return value


def setting(parse: Callable[[str], Any]) -> Callable[[str], tuple[str, Any]]:
    """Return a parser of ``VALUE`` and ``PATTERN=VALUE``; an equals sign in parentheses belongs to the value."""

    def parse_setting(text: str) -> tuple[str, Any]:
        pattern, separator, value = text.partition("=")
        if not separator or "(" in pattern:
            pattern, value = "*", text
        try:
            return pattern, parse(value)
        except (ValueError, SyntaxError, TypeError, BnnifyError) as error:
            raise argparse.ArgumentTypeError(f"cannot read {value!r}: {error}") from error

    return parse_setting


def merged(given: Sequence[tuple[str, Any]]) -> Any:
    """Return one value, or a mapping from globs to values in the order of the command line.

    The value without a pattern comes last, wherever it was given; of several the last one holds.
    """
    by_pattern = {pattern: value for pattern, value in given if pattern != "*"}
    everywhere = [value for pattern, value in given if pattern == "*"]
    if not by_pattern:
        return everywhere[-1]
    if everywhere:
        by_pattern["*"] = everywhere[-1]
    return by_pattern


def prior(text: str) -> Prior:
    """Make the prior that ``text`` writes as a call, such as ``Gaussian(std=0.1)``."""
    return _called(text, PRIORS)


def std(text: str) -> PosteriorStd:
    """Make the rule for σ that ``text`` writes as a number or as a call, such as ``Relative(0.1)``."""
    try:
        number = float(text)
    except ValueError:
        return _called(text, STARTING_STDS)
    return Constant(number)


def posterior(text: str) -> PosteriorFamily:
    """Make the posterior that ``text`` names: ``mean-field`` or ``point``."""
    _check_known(text, POSTERIORS)
    return POSTERIORS[text]()


def estimator(text: str) -> str:
    """Return ``text``, which must be the name of an estimator."""
    _check_known(text, ESTIMATORS)
    return text


def _check_known(name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise ArgumentError(f"known are {', '.join(known)}")


def _called(text: str, kinds: Mapping[str, Callable[..., Any]]) -> Any:
    """Make what a call such as ``Gaussian(std=0.1)`` makes; its arguments are literals, and nothing is evaluated."""
    call = ast.parse(text, mode="eval").body
    if not isinstance(call, ast.Call):  # a name without parentheses
        call = ast.Call(call, [], [])
    name = ast.unparse(call.func)
    _check_known(name, kinds)
    if call.args and name in PRIORS:
        raise ArgumentError(f"name what you set, as in {name}({dataclasses.fields(PRIORS[name])[-1].name}=0.1)")
    positional = [ast.literal_eval(argument) for argument in call.args]
    named = {str(argument.arg): ast.literal_eval(argument.value) for argument in call.keywords}
    return kinds[name](*positional, **named)
