"""The figures that are kept, and the pages that show them."""

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
PAGES = [page.read_text() for page in (FOLDER.parent / "docs").glob("*.md")]
RESULTS = {path.stem: path.stem for path in sorted(FOLDER.glob("results/*.json"))} | {
    "cifar10_methods_resnet32": "cifar10_methods",
    "cifar10_methods_thirteen": "cifar10_methods",
}
"""The files of kept figures, and the scripts that found them."""
IN_PART = {"cifar10_methods_resnet32": 1, "cifar10_methods_thirteen": 0}
"""How many tables a page shows, if not all: of an earlier run it says no more than where it agrees."""


@pytest.mark.parametrize("name", RESULTS)
def test_every_figure_that_is_kept_stands_in_a_page(name, monkeypatch, capsys):
    for library in ("ivon", "laplace", "rich", "timm", "torchmetrics"):
        pytest.importorskip(library)
    script = importlib.import_module(f"benchmarks.quality.{RESULTS[name]}")
    monkeypatch.setattr(sys, "argv", [name, "--from", str(FOLDER / f"results/{name}.json"), "--markdown"])
    script.main()
    tables = [part for part in capsys.readouterr().out.split("\n\n") if part.startswith("|")]
    assert tables
    shown = {line for page in PAGES for line in page.splitlines()}
    rows = [row for table in tables[: IN_PART.get(name)] for row in table.splitlines() if any(map(str.isdigit, row))]
    assert [row for row in rows if row not in shown] == []
