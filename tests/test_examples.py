"""The programs in examples/ run on two processes, as their first lines say.

They seed all ranks alike, or the trainers do that they use.
"""

import csv
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import bnnify
from bnnify.cli.demo import load_digits, make_network

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
RAY = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "240"}

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


def run(*command):
    environment = {**os.environ, **RAY}
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, *map(str, command)], capture_output=True, text=True, cwd=EXAMPLES.parent, env=environment
        )
        if done.returncode == 0:
            return done.stdout
        # In one run of some hundreds gloo does not connect, or aborts a process whose work is done: where DTensors are
        # in use, torch keeps its threads beyond the end of the process group. What goes wrong otherwise does so twice.
    raise AssertionError(done.stderr[-3000:])


def train(launch, example, folder, *options):
    """Run a program with recorded noise, and return the NLL that it prints and the weights that it writes."""
    recorder = [*launch, Path(__file__).parent / "recorded_noise.py", folder.parent]
    printed = run(*recorder, EXAMPLES / example, "--checkpoint", folder, *options)
    nll = float(re.search(r"NLL .* 1297 test digits: (\S+)", printed).group(1))
    return nll, torch.load(folder / "model.bnn.pt", weights_only=True)["state_dict"]


def assert_independent(noise_of_ranks):
    size = min(map(len, noise_of_ranks))
    both = torch.stack([noise[:size] for noise in noise_of_ranks])
    assert size > 1000
    assert abs(both.corrcoef()[0, 1]) < 5 / math.sqrt(size)
    torch.testing.assert_close(both.std(1), torch.ones(2), rtol=0, atol=5 / math.sqrt(2 * size))


@pytest.mark.parametrize(
    ("library", "example", "options"),
    [
        ("torch", "ddp.py", "--accumulate=2 --bfloat16"),
        ("torch", "fsdp2.py", "--bfloat16"),
        ("accelerate", "accelerate_ddp.py", "--accumulate=2 --bfloat16"),
        ("lightning", "lightning_trainer.py", "--strategy=ddp --accumulate=2 --bfloat16"),
        ("lightning", "lightning_trainer.py", "--strategy=fsdp --accumulate=2"),
        ("transformers", "hf_trainer.py", "--accumulate=2 --bfloat16"),
        ("ray.train", "ray_train.py", ""),
    ],
)
def test_ranks_draw_noise_of_their_own_and_a_run_that_was_stopped_goes_on_bit_for_bit(
    library, example, options, tmp_path
):
    pytest.importorskip(library)
    launch, folder = [] if library == "ray.train" else TORCHRUN, tmp_path / "checkpoint"
    found, weights = train(launch, example, folder, "--epochs=3", *options.split())
    assert 0 < found < (1 if library != "transformers" else math.log(17))
    assert_independent([torch.load(tmp_path / f"{rank}.pt") for rank in range(2)])
    if example == "ddp.py":
        bnnify.load(folder / "model.bnn.pt", make_network())
    if library == "ray.train":  # which goes by a list of its own, and not by what lies in the folder
        return
    checkpoints = (path for path in folder.iterdir() if path.name != "model.bnn.pt")
    last = max(checkpoints, key=lambda path: path.stat().st_mtime)
    shutil.rmtree(last) if last.is_dir() else last.unlink()
    again, resumed = train(launch, example, folder, "--epochs=3", *options.split())
    assert last.exists()
    assert again == found
    torch.testing.assert_close(resumed, weights, rtol=0, atol=0)


def test_the_model_that_trains_under_ddp_may_be_compiled(tmp_path):
    run(*TORCHRUN, EXAMPLES / "ddp.py", "--checkpoint", tmp_path, "--epochs=1", "--compile")
    assert (tmp_path / "model.bnn.pt").exists()


def test_a_folder_of_images_is_predicted_as_by_one_process(tmp_path):
    image = pytest.importorskip("PIL.Image")
    network, _, test = load_digits()
    bnn = bnnify.convert(network)
    bnnify.save(bnn, tmp_path / "model.bnn.pt")
    pixels = (255 * test.images[:9]).round().byte()
    for number, each in enumerate(pixels):
        image.fromarray(each[0].numpy()).save(tmp_path / f"{number}.png")
    table = tmp_path / "table.csv"
    run(*TORCHRUN, EXAMPLES / "predict_folder.py", tmp_path, "--model", tmp_path / "model.bnn.pt", "--table", table)
    with table.open(newline="") as file:
        rows = [*csv.reader(file)][1:]
    probabilities, classes = bnn.predict(pixels / 255, likelihood="logits", seed=0).mean.max(1)
    assert [row[0] for row in rows] == [f"{number}.png" for number in range(9)]
    assert [int(row[1]) for row in rows] == classes.tolist()
    torch.testing.assert_close(torch.tensor([float(row[2]) for row in rows]), probabilities)
