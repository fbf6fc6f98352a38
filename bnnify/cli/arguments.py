"""What a command line says of a model and its posterior, made into what the library takes."""

__all__ = ["estimator", "factory", "json_object", "merged", "prior", "setting", "std"]

import argparse
import ast
import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from ..distributions.initial_std import Constant, Moped, Relative
from ..distributions.prior import Prior
from ..distributions.priors import Gaussian, Laplace, Pretrained, ScaleMixture
from ..draws.estimators import ESTIMATORS
from ..errors import ArgumentError, BnnifyError, CheckpointError


def factory(name: str, arguments: Mapping[str, Any]) -> Callable[[], nn.Module]:
    module_name, _, factory_name = name.partition(":")

    def make() -> nn.Module:
        # As with `python -m`: a module in the working directory can be named.
        sys.path.insert(0, "")
        try:
            model = getattr(importlib.import_module(module_name), factory_name)(**arguments)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"Cannot make a model with --model {name}: {type(error).__name__}: {reason}. "
                "Give package.module:factory, where factory(**model_args) returns the model."
            ) from error
        finally:
            sys.path.remove("")
        if not isinstance(model, nn.Module):
            raise CheckpointError(f"--model {name} made a {type(model).__name__}, not a torch.nn.Module.")
        return model

    return make


def json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("is no JSON object such as '{\"width\": 64}'")
    return value


def setting(parse: Callable[[str], Any]) -> Callable[[str], tuple[str, Any]]:
    """A value, or ``PATTERN=VALUE``; an equals sign inside parentheses belongs to the value."""

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
    """Settings in the order of the command line; the one without a pattern comes last, wherever it was given."""
    named = [(pattern, value) for pattern, value in given if pattern != "*"]
    general = [value for pattern, value in given if pattern == "*"]
    return {**dict(named), **({"*": general[-1]} if general else {})} if named else general[-1]


def prior(text: str) -> Prior:
    return _called(text, _PRIORS)


def std(text: str) -> Any:
    try:
        return Constant(float(text))
    except ValueError:
        return _called(text, _RULES)


def estimator(text: str) -> str:
    if text not in ESTIMATORS:
        raise ArgumentError(f"known are {', '.join(ESTIMATORS)}")
    return text


def _called(text: str, kinds: Mapping[str, Any]) -> Any:
    """What a call such as ``Gaussian(std=0.1)`` makes, written as in Python and in the report."""
    call = ast.parse(text, mode="eval").body
    if isinstance(call, ast.Name):
        call = ast.Call(call, [], [])
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in kinds):
        raise ArgumentError(f"known are {', '.join(kinds)}")
    positional = [ast.literal_eval(argument) for argument in call.args]
    return kinds[call.func.id](*positional, **{str(k.arg): ast.literal_eval(k.value) for k in call.keywords})


_PRIORS = {kind.__name__: kind for kind in (Gaussian, Laplace, Pretrained, ScaleMixture)}
_RULES = {kind.__name__: kind for kind in (Moped, Relative)}
