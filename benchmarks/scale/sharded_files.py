"""Measures the memory and time in which `bnnify-cli` converts, inspects and collapses a model in shards."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from ..harness import report
from ..harness.report import Run, Table
from ..speed.checkpoint_memory import run_command

MAKE = """
import sys, transformers
folder, layers, shard_size = sys.argv[1:]
config = transformers.LlamaConfig(
    vocab_size=8192, hidden_size=2048, intermediate_size=5632, num_hidden_layers=int(layers), num_attention_heads=16
)
transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=shard_size)
"""


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--layers", type=int, default=12, help="of a Llama; 12 make a file of 5 GB with ρ in float32")
    parser.add_argument("--max-shard-size", default="500MB", help="of the original and of the converted file")
    parser.add_argument(
        "--folder", type=Path, help="where to put the files for the time; by default that of the system"
    )
    parser.add_argument("--leave-out", nargs="*", default=[], help="commands that are not measured, such as inspect")
    options = parser.parse_args()
    run = Run(options, ["torch", "bnnify", "safetensors", "transformers"])
    baseline, _ = run_command(["--help"])
    results, rows = {}, []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        plain, converted = Path(folder, "llama"), Path(folder, "llama.bnn")
        subprocess.run(
            [sys.executable, "-c", MAKE, str(plain), str(options.layers), options.max_shard_size], check=True
        )
        commands = {
            "convert": (["convert", str(plain), "--max-shard-size", options.max_shard_size], plain),
            "inspect": (["inspect", str(converted)], converted),
            "collapse": (["collapse", str(converted)], converted),
        }
        for name, (arguments, source) in commands.items():
            if name in options.leave_out:
                continue
            peak, seconds = run_command(arguments)
            size, largest = _sizes(source)
            results[name] = {"peak": peak, "seconds": seconds, "size": size, "largest_shard": largest}
            run.record(results, baseline=baseline)
            figures = [size / 1e9, largest / 1e9, (peak - baseline) / 1e9, (peak - baseline) / largest]
            rows.append([name, *(f"{figure:.2f}" for figure in figures), f"{seconds:.0f}"])
    headings = ["command", "reads, GB", "largest shard, GB", "peak memory, GB", "× the largest shard", "seconds"]
    note = (
        f"peak memory: resident, mapped pages of files included, without the {baseline / 1e9:.2f} GB of the libraries"
    )
    run.show(
        Table(f"a Llama of {options.layers} layers in shards of {options.max_shard_size}", headings, rows), notes=[note]
    )


def _sizes(folder: Path) -> tuple[int, int]:
    """The bytes of all shards, and of the largest."""
    sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
    return sum(sizes), max(sizes)


if __name__ == "__main__":
    main()
