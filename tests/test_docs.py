"""The code in README.md and in docs/ runs: the blocks of one file in order, in one namespace."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch

import bnnify
from bnnify import distributions, layers

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


def test_every_public_name_is_on_a_page_of_the_api_and_in_its_index():
    entries, index = set(), (ROOT / "docs/api/index.md").read_text(encoding="utf-8")
    for path in ROOT.glob("docs/api/*.md"):
        entries |= set(re.findall(r"^\.\. auto(?:class|function|exception):: (\S+)$", path.read_text("utf-8"), re.M))
    listed = set(re.findall(r"^   ([\w.]+)$", index, re.M))
    parts = {f"{part.__name__}.{name}" for part in (layers, distributions) for name in part.__all__}
    public = set(bnnify.__all__) - {"__version__"} | {
        name for name in parts if name.rpartition(".")[2] not in bnnify.__all__
    }
    assert public <= entries
    assert {name.removeprefix("bnnify.") for name in public} <= listed
