"""Exit status, errors, and what is left after an interruption."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import bnnify
from bnnify.cli.command import main

from .conftest import MADE, there


def test_python_runs_the_package_as_the_command(model):
    def run(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "-m", "bnnify", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    assert run("--version").stdout.startswith("bnnify-cli ")
    assert run().returncode == 2
    assert run("convert", "missing.pt").returncode == 1
    done = run("convert", "model.pt", *MADE)
    assert (done.returncode, done.stderr) == (0, "wrote model.bnn.pt\n")


@pytest.mark.parametrize("before", [True, False])
def test_debug_shows_the_traceback(model, before):
    arguments = ["convert", "absent.pt", *MADE, "-o", "out.pt"]
    with pytest.raises(bnnify.CheckpointError):
        main(["--debug", *arguments] if before else [*arguments, "--debug"])


def test_a_wrong_command_line_exits_with_two(capsys):
    for arguments in [
        ["convert"],
        ["convert", "model.pt", "--std", "many"],
        ["convert", "model.pt", "--prior", "Gaussian(std=0)"],
        ["convert", "model.pt", "--prior", "__import__('os').system('true')"],
        ["convert", "model.pt", "--estimator", "best"],
        ["convert", "model.pt", "--posterior", "best"],
        ["convert", "model.pt", "--model-args", "[1]"],
        ["prune", "model.pt", "much"],
        ["export", "model.pt", "--input", "2,4"],
        ["export", "model.pt", "-o", "out.onnx", "--input", "2,four"],
        ["export", "model.pt", "-o", "out.onnx", "--input", "float:2,4", "--format", "tensorflow"],
        ["dance"],
        [],
    ]:
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert capsys.readouterr().out == ""


def test_a_sigma_that_is_a_number_but_none_that_can_be_is_refused_as_a_number(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["convert", "model.pt", "--std", "-1"])
    assert "must be a positive, finite number, not -1.0" in capsys.readouterr().err


def run(*arguments, code="", **options):
    """The command in a process of its own, after ``code``."""
    start = [sys.executable, "-c", f"{code}\nimport sys\nfrom bnnify.cli import main\nsys.exit(main())"]
    return subprocess.Popen([*start, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_a_reader_that_has_seen_enough_is_no_error(model):
    main(["-q", "convert", "model.pt", *MADE])
    code = "import sys; sys.stdout.reconfigure(write_through=True)"
    process = run("inspect", "model.bnn.pt", "--json", code=code)
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr.read() == ""


SLOW_WRITE = textwrap.dedent("""
    import signal, time, torch
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process in the background may not have
    def save(content, file, *args, **kwargs):
        file.write(b"half of it")
        file.flush()
        print("writing", flush=True)
        time.sleep(60)
    torch.save = save
""")


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_write_leaves_nothing_under_the_final_name(model, tmp_path, number):
    before = there(tmp_path)
    process = run("-q", "convert", "model.pt", *MADE, code=SLOW_WRITE)
    assert process.stdout.readline() == "writing\n"
    process.send_signal(number)
    assert process.wait(30) == (1 if number == signal.SIGINT else -signal.SIGKILL)
    left = there(tmp_path)
    assert "model.bnn.pt" not in left
    assert {name: left[name] for name in before} == before
    if number == signal.SIGINT:
        assert left == before
        assert process.stderr.read() == "bnnify-cli: interrupted; nothing was written\n"
