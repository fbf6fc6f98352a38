"""Measures the memory and time in which `bnnify-cli` converts, inspects and collapses a large checkpoint."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ..harness import report
from ..harness.report import Run, Table

MAKE = "import sys, torch, torchvision; torch.save(torchvision.models.get_model(sys.argv[1]).state_dict(), sys.argv[2])"
# What getrusage tells of a child is never less than what its parent held; VmHWM is the child's own.
COMMAND = """
import atexit, re, sys
atexit.register(lambda: print("peak", re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]))
from bnnify.cli import main
sys.exit(main())
"""


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--builder", default="vit_l_16", help="a model of torchvision's, of 1.2 GB by default")
    options = parser.parse_args()
    run = Run(options, ["torch", "bnnify"])
    baseline, _ = run_command(["--help"])
    results: dict[str, dict[str, float]] = {}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, converted = Path(folder, "model.pt"), Path(folder, "model.bnn.pt")
        subprocess.run([sys.executable, "-c", MAKE, options.builder, str(checkpoint)], check=True)
        size = checkpoint.stat().st_size
        commands = {
            "convert": ["convert", str(checkpoint)],
            "inspect": ["inspect", str(converted)],
            "prune 0.5": ["prune", str(converted), "0.5"],
            "collapse": ["collapse", str(converted)],
        }
        for name, arguments in commands.items():
            peak, seconds = run_command(arguments)
            results[name] = {"peak": peak, "seconds": seconds}
            run.record(results, size=size, baseline=baseline)
            ratios = [f"{peak / size:.2f}", f"{(peak - baseline) / size:.2f}"]
            rows.append([name, f"{peak / 1e9:.2f}", *ratios, f"{seconds:.0f}"])
        note = f"libraries alone {baseline / 1e9:.2f} GB; converted file {converted.stat().st_size / size:.2f} × it"
    headings = ["command", "peak memory, GB", "× the file", "without the libraries", "seconds"]
    run.show(Table(f"{options.builder}: a checkpoint of {size / 1e9:.2f} GB", headings, rows), notes=[note])


def run_command(arguments: list[str]) -> tuple[int, float]:
    """Peak resident memory in bytes, mapped pages of the file included, and wall time; on Linux."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", COMMAND, "-q", *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"bnnify-cli {arguments[0]} failed")
    return int(done.stdout.split()[-1]) * 1024, time.perf_counter() - started


if __name__ == "__main__":
    main()
