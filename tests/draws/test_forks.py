"""Processes that are forked with one seed draw networks of their own."""

import json
import multiprocessing
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="needs processes that are forked"
)

PROGRAM = """
import json
import os
import sys

import torch
import bnnify

if len(sys.argv) > 1:
    torch.manual_seed(int(sys.argv[1]))
bnn = bnnify.convert(torch.nn.Linear(4, 3), posterior_std=1.0)
x, loader = torch.ones(1, 4), [torch.ones(1, 4)] * 300  # which is more than predict holds at a time


def networks():
    with bnn.draw():
        yield bnn.module(x)
    yield bnn(x)[0]
    yield bnn.predict(x, 2).mean
    yield bnn.predict(loader, 2).mean[0]
    yield bnnify.freeze(bnn, 2)(x)[0]


def drawn():
    return [network.flatten().tolist() for network in networks()]


def forked():
    read, write = os.pipe()
    if os.fork():
        os.wait()
        return json.loads(os.read(read, 100_000))
    found = {"inherited": drawn(), "seed=": bnn.predict(x, 2, seed=0).mean.flatten().tolist()}
    torch.manual_seed(99)
    found["seeded here"] = drawn()
    os.write(write, json.dumps(found).encode())
    os._exit(0)


print(json.dumps([forked(), forked(), {"inherited": drawn()}]))
"""


def run(*arguments: str) -> list:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_workers_draw_different_networks_and_the_same_program_draws_the_same_again():
    for arguments in ([], ["0"]):
        first, second, parent = run(*arguments)
        for networks in zip(first["inherited"], second["inherited"], parent["inherited"], strict=True):
            assert len(set(map(tuple, networks))) == 3
        assert first["seed="] == second["seed="]
        assert first["seeded here"] == second["seeded here"]
    assert run("0") == [first, second, parent]
