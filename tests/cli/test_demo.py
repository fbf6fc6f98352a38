"""The demo."""

import sys
from importlib.resources import files as package_files
from pathlib import Path

import pytest

from bnnify.cli.command import main


def test_the_demo_shows_what_fine_tuning_gains_within_80_columns(tmp_path, monkeypatch, capsys):
    pytest.importorskip("rich")
    pytest.importorskip("torchmetrics")
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("bnnify.cli.demo.SEEDS", 2)
    assert main(["demo", "--picture", str(tmp_path / "digits.png")]) == 0
    out, err = capsys.readouterr()
    rows = [line.split("│") for line in out.splitlines() if line.startswith("│")]
    assert [row[1].strip() for row in rows] == ["as trained", "trained longer", "converted", "fine-tuned"]
    nll = [float(row[3].partition("±")[0]) for row in rows]
    assert nll[3] < 0.9 * nll[2] < 0.9 * nll[0]
    assert nll[3] < 0.9 * nll[1]
    assert "…" not in out
    assert err == ""
    assert (tmp_path / "digits.png").stat().st_size > 1000


def test_what_the_demo_ships_is_small_and_says_where_it_comes_from():
    folder = package_files("bnnify") / "data"
    assert sum(path.stat().st_size for path in Path(str(folder)).iterdir()) < 200_000
    assert "CC BY 4.0" in (folder / "README.md").read_text()


def test_without_an_extra_the_demo_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["demo"]) == 1
    assert "pip install rich torchmetrics" in capsys.readouterr().err
