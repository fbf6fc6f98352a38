"""What the command exports."""

import onnxruntime
import pytest
import torch

import bnnify
from bnnify.cli.command import main

from .conftest import MADE, there


def test_export_writes_what_the_library_does_under_the_same_seed_and_says_what_it_compared(model, capsys):
    arguments = ["export", "own.bnn.pt", *MADE, "--input", "2,4", "-n", "3", "--likelihood", "logits", "--seed", "1"]
    assert main([*arguments, "-o", "out.onnx", "--outputs", "mean,std"]) == 0
    out, err = capsys.readouterr()
    assert "3 networks; inputs input (any size of dimension 0); outputs mean, std" in out
    assert "the largest difference is" in out
    assert err.endswith("wrote out.onnx\n")
    bnn, x = bnnify.load("own.bnn.pt", model), torch.randn(5, 4)
    torch.manual_seed(1)
    mean, _ = onnxruntime.InferenceSession("out.onnx").run(None, {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(mean), bnn.predict(x, 3, likelihood="logits").mean)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["-o", "out.h5"], "`out.h5` does not say which format to write"),
        (["--input", "2,9"], "shapes cannot be multiplied"),
        (["--input", "a=2,4"], "unexpected keyword argument 'a'"),
        (["--input", "a=2,4", "--input", "2,4"], "Give each --input a name"),
        (["--outputs", "median"], "Unknown output 'median'"),
        (["--likelihood", "odds"], "Unknown likelihood 'odds'"),
        (["--model", "my_models:branching"], "Could not guard on data-dependent expression"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_leaves_no_file(model, tmp_path, capsys, change, message):
    before = there(tmp_path)
    arguments = ["export", "own.bnn.pt", *MADE, "-o", "out.onnx", *([] if "--input" in change else ["--input", "2,4"])]
    assert main([*arguments, *change]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert there(tmp_path) == before
