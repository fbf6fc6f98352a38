"""The code in README.md and in docs/ runs: the blocks of one file in order, in one namespace."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = {"accelerate", "lightning", "peft", "transformers"}  # which the library itself never needs
BLOCK = re.compile(r"^```(python|diff)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(path):
    """Yield the line where each block starts and its source; a diff yields the new side of it."""
    text = path.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        language, source = match.groups()
        if language == "diff":
            source = "".join(line[1:] or "\n" for line in source.splitlines(keepends=True) if not line.startswith("-"))
        yield text.count("\n", 0, match.start(2)), source


PAGES = [path for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))] if any(blocks(path))]


def test_there_is_code_to_run():
    assert {"README.md", "docs/quickstart.md"} <= {path.relative_to(ROOT).as_posix() for path in PAGES}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_code_blocks_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for line, source in blocks(path):
            # The empty lines in front make a traceback point at the line of the page.
            code = compile("\n" * line + source, str(path), "exec")
            try:
                exec(code, page.__dict__)
            except ModuleNotFoundError as error:
                if error.name not in OPTIONAL:
                    raise
                pytest.skip(f"from line {line} on it needs {error.name}")
