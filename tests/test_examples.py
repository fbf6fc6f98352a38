"""The programs in examples/ run on two processes, as their first lines say, and go on after a stop as without one."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import bnnify
from bnnify.cli.demo import make_network

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


def run(example, checkpoint, *arguments):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, str(EXAMPLES / example), "--checkpoint", str(checkpoint), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=EXAMPLES.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return float(re.search(r"NLL on 1297 test digits: (\S+)", done.stdout).group(1))


@pytest.mark.parametrize(
    ("example", "checkpoint", "options"),
    [("ddp.py", "model.pt", ["--accumulate=2", "--bfloat16"]), ("fsdp2.py", "model", ["--bfloat16"])],
)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(example, checkpoint, options, tmp_path):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    for folder in straight, stopped:
        folder.mkdir()
    found = run(example, straight / checkpoint, "--epochs=3", *options)
    assert 0 < found < 1
    run(example, stopped / checkpoint, "--epochs=1", *options)
    assert run(example, stopped / checkpoint, "--epochs=3", *options) == found
    files = (torch.load(folder / "model.bnn.pt", weights_only=True)["state_dict"] for folder in (straight, stopped))
    for (name, one), other in zip(next(files).items(), next(files).values(), strict=True):
        assert torch.equal(one, other), name
    if example == "ddp.py":
        bnnify.load(straight / "model.bnn.pt", make_network())
