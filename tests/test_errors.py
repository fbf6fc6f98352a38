"""Errors that bnnify raises are its own, so that one `except bnnify.BnnifyError` catches all of them."""

import ast
from pathlib import Path

import pytest
from torch import nn

import bnnify

ROOT = Path(bnnify.__file__).parent
PLACES = {path.relative_to(ROOT).parts[0] for path in ROOT.rglob("*.py")}
FILES = [path for path in sorted(ROOT.rglob("*.py")) if path.relative_to(ROOT).parts[0] in PLACES]


# No user sees these: the reader of files makes a CheckpointError of the first; the parser an exit status of the second.
HANDLED = {"Refusal", "argparse.ArgumentTypeError", "SystemExit"}
HANDLED |= {"kind"}  # of error, which the caller names
HANDLED |= {"AttributeError"}  # with which a property says that there is no such attribute


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_raised_is_an_error_of_bnnify(path):
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Assert), f"line {node.lineno}: say what is wrong"
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = ast.unparse(node.exc.func)
            if name not in HANDLED and not name.startswith("_"):  # else a function that makes the error
                assert issubclass(getattr(bnnify.errors, name), bnnify.BnnifyError), f"line {node.lineno}"


@pytest.mark.parametrize(
    ("call", "kinds"),
    [
        (lambda bnn: bnn.predict([], 2), (bnnify.ArgumentError, ValueError)),
        (lambda bnn: bnn.predict(None, 2), (bnnify.ArgumentTypeError, TypeError, ValueError)),
        (lambda bnn: bnnify.prune(bnn, 2), (bnnify.ArgumentError, ValueError)),
        (lambda bnn: bnnify.convert(nn.ReLU()), (bnnify.ConversionError, ValueError)),
    ],
)
def test_an_error_of_bnnify_is_one_of_python_too(call, kinds):
    for kind in (bnnify.BnnifyError, *kinds):
        with pytest.raises(kind):
            call(bnnify.convert(nn.Linear(2, 2)))
