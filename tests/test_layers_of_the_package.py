"""The folders of the package stand on floors, import only what is below, and use no private names of torch."""

import ast
import graphlib
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import bnnify

ROOT = Path(bnnify.__file__).parent
FLOORS = [  # from the ground up
    {"errors", "report", "torch_internals", "version"},
    {"progress"},
    {"distributions"},
    {"draws"},
    {"modules"},
    {"prediction"},
    {"model"},
    {"convert", "layers"},
    {"training"},
    {"decisions"},
    {"analysis"},
    {"checkpoints"},
    {"deployment"},
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


OVERRIDDEN = {"_parameters", "_buffers", "_modules", "_apply", "_load_from_state_dict"}
"""Where modules keep what they hold, and methods that Bayesian classes override."""
OBJECTS = [nn.LSTM(1, 1), nn.ConvTranspose1d(1, 1, 1), nn.MultiheadAttention(1, 1), torch.nn.modules, nn.modules.linear]
OBJECTS += [torch.ones(1), torch.Tensor, torch.ops.aten.add.Tensor, nn.modules.module]
OBJECTS += prune.identity(nn.Linear(1, 1), "weight")._forward_pre_hooks.values()
PRIVATE = {name for each in OBJECTS for name in dir(each) if name.startswith("_") and not name.startswith("__")}


def dotted(node):
    """The parts of ``a.b.c``; empty if it does not start with a name."""
    if isinstance(node, ast.Name):
        return [node.id]
    before = dotted(node.value) if isinstance(node, ast.Attribute) else []
    return [*before, node.attr] if before else []


def private_names_of_torch(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "torch":
            imported = [[*(node.module or "").split("."), alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            imported = [alias.name.split(".") for alias in node.names]
        else:
            imported = [dotted(node)]
        yield from (".".join(p) for p in imported if p[:1] in (["torch"], ["nn"]) and any(map(_is_private, p)))
        of_another = isinstance(node, ast.Attribute) and dotted(node.value) not in (["self"], ["cls"])
        if of_another and node.attr in PRIVATE - OVERRIDDEN:
            yield node.attr


def _is_private(name):
    return name.startswith("_") and not name.startswith("__")


@pytest.mark.parametrize("name", [n for n in FILES if n.split(".")[0] != "torch_internals"])
def test_private_names_of_torch_stand_in_one_file(name):
    assert not list(private_names_of_torch(FILES[name].read_text()))


@pytest.mark.parametrize(
    "source",
    [
        "torch._C._is_tracing()",
        "import torch._dynamo",
        "from torch.utils._pytree import tree_map",
        "from torch.nn.modules.conv import _ConvNd",
        "layer._flat_weights_names",
        "node.target._schema.name",
        "hook._tensor_name",
        "nn.modules.conv._ConvNd",
    ],
)
def test_a_private_name_of_torch_is_found(source):
    assert list(private_names_of_torch(source))
