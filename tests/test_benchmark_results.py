"""The figures that are kept, and the pages that show them."""

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
PAGES = [page.read_text() for page in (FOLDER.parent / "docs").glob("*.md")]
KEPT = [path for path in sorted((FOLDER / "results").glob("*.json")) if (FOLDER / f"quality/{path.stem}.py").exists()]
"""But for earlier runs, of which a page says no more than whether they agree."""


@pytest.mark.parametrize("kept", KEPT, ids=lambda path: path.stem)
def test_every_figure_that_is_kept_stands_in_a_page(kept, monkeypatch, capsys):
    for library in ("ivon", "laplace", "rich", "timm", "torchmetrics"):
        pytest.importorskip(library)
    script = importlib.import_module(f"benchmarks.quality.{kept.stem}")
    monkeypatch.setattr(sys, "argv", [kept.stem, "--from", str(kept), "--markdown"])
    script.main()
    shown = {line for page in PAGES for line in page.splitlines()}
    rows = [line for line in capsys.readouterr().out.splitlines() if line[:1] == "|" and any(map(str.isdigit, line))]
    assert len(rows) > 3
    assert [row for row in rows if row not in shown] == []
