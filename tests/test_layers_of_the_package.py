"""The folders of the package stand on floors, and a module imports only what is on a floor below its own."""

import ast
import graphlib
from pathlib import Path

import pytest

import bnnify

ROOT = Path(bnnify.__file__).parent
FLOORS = [  # from the ground up
    {"errors", "report", "torch_internals"},
    {"checks"},
    {"distributions"},
    {"draws"},
    {"modules"},
    {"prediction"},
    {"model"},
    {"convert", "layers"},
    {"training", "analysis"},
    {"deployment", "checkpoints"},
    {"cli", "__init__"},
    {"__main__"},
]
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")}


def imports(name):
    """The modules of the package that a module imports, wherever in it the import stands."""
    package = name.split(".")[:-1]
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "bnnify"):
            base = package[: len(package) - (node.level - 1)] if node.level else []
            base += [part for part in (node.module or "").split(".") if part and part != "bnnify"]
            for alias in node.names:
                found = next(
                    ".".join(c) for c in ([*base, alias.name], base, [*base, "__init__"]) if ".".join(c) in FILES
                )
                yield found


def floor(name):
    return next(number for number, places in enumerate(FLOORS) if name.split(".")[0] in places)


@pytest.mark.parametrize("name", FILES)
def test_arrows_only_go_down(name):
    place = name.split(".")[0]
    up = [other for other in imports(name) if other.split(".")[0] != place and floor(other) >= floor(name)]
    assert not up


def test_no_module_imports_itself_in_a_circle():
    graph = {name: {other for other in imports(name) if not name.endswith("__init__")} for name in FILES}
    list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith("__init__")])
def test_each_folder_says_its_purpose_in_a_sentence_and_exports_names(name):
    tree = ast.parse(FILES[name].read_text())
    assert ast.get_docstring(tree).endswith(".")
    assert any(isinstance(node, ast.Assign) and node.targets[0].id == "__all__" for node in tree.body)
