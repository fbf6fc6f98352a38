"""Exported programs (``.pt2``), which torch.export.load reads by running parts of them.

It evaluates the expressions of symbolic sizes, executes the guards, imports the types of the inputs, looks functions up
by name and unpickles sample inputs freely. So it is given a copy of the archive with what a model needs and nothing
else: operators of ATen and torchvision, sizes that are sums and products of symbols, tensors as bytes.
"""

__all__ = ["is_program", "read_program"]

import io
import json
import logging
import math
import re
import warnings
import zipfile
from typing import Any

import torch
from torch import nn

from .archive import Archive, Refusal
from .formats import OpenFile

_MODEL = "models/model.json"
_CONFIGS = {
    "data/weights/model_weights_config.json": re.compile(r"weight_\d+"),
    "data/constants/model_constants_config.json": re.compile(r"tensor_\d+"),
}
_SAMPLE_INPUTS = "data/sample_inputs/model.pt"
_HEADERS = ("archive_format", "archive_version", ".data/version", "byteorder")
_MAX_JSON = 64 << 20
_SPARE_BYTES = 64 << 20

_TARGET = re.compile(
    r"torch\.ops\.(aten|torchvision)\.\w+\.\w+|_operator\.(getitem|add|sub|mul|floordiv|mod|ge|gt|le|lt|eq|ne|neg)"
    r"|torch\.(sym_max|sym_min|sym_not|sym_sum)|torch\.ops\.higher_order\.wrap_with_(set_grad_enabled|autocast)"
)
_FORBIDDEN_TARGETS = re.compile(r"torch\.ops\.aten\.(from_file|_print|_save|_load)\b.*")
_SYMBOL = re.compile(r"[suz]\d{1,6}")
# What sympy's srepr writes for sums and products of symbols; not powers, which can be endless.
_EXPRESSION = re.compile(r"[\w'()+\-*,= ]{1,1000}", re.ASCII)
_FUNCTIONS = {"Symbol", "Integer", "Add", "Mul", "Mod", "Max", "Min", "FloorDiv"}
_FUNCTIONS |= {"positive", "nonnegative", "integer", "True", "False"}
_WORD = re.compile(r"[\w.\-]*", re.ASCII)
_TYPES = (None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")
# Objects of classes that C++ or Python code registered.
_OBJECTS = ("as_custom_obj", "class_fqn", "custom_obj_values", "as_opaque")
_DROPPED: dict[str, Any] = {"metadata": {}, "guards_code": [], "torch_version": ""}


def is_program(archive: Archive) -> bool:
    """Tell whether the archive is one that torch.export.save wrote."""
    return "archive_format" in archive or "serialized_exported_program.json" in archive or _MODEL in archive


def read_program(source: OpenFile, archive: Archive, trust: bool) -> nn.Module:
    """Read the module of an exported program.

    Raises:
        Refusal: It has parts that could not be loaded without running them, or is of a torch before 2.8.
    """
    content: Any = source.path if trust else io.BytesIO(_harmless_copy(source, archive))
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), torch.device("cpu"):  # where torch has what it reads
            warnings.simplefilter("ignore")
            return torch.export.load(content).module()
    finally:
        logging.disable(disabled)


def _harmless_copy(source: OpenFile, archive: Archive) -> bytes:
    if _MODEL not in archive:
        raise Refusal("it was exported by a torch before 2.8, or is no model. Export it again with a newer one.")
    program = _read_json(archive, _MODEL)
    _check(program, "")
    for symbol in program.get("range_constraints") or {}:
        if not _SYMBOL.fullmatch(symbol):
            raise _needs_trust(f"the size `{symbol}`")
    records = {_MODEL: json.dumps(program).encode(), _SAMPLE_INPUTS: b""}
    bytes_left = 4 * source.size + _SPARE_BYTES
    for name, file_names in _CONFIGS.items():
        config = _read_json(archive, name)
        folder = name.rpartition("/")[0]
        for payload in config["config"].values():
            file_name, meta = payload["path_name"], payload["tensor_meta"]
            if payload["use_pickle"] is not False or not file_names.fullmatch(file_name):
                raise _needs_trust(f"the pickled object `{file_name}`")
            data = records.setdefault(f"{folder}/{file_name}", archive.read(f"{folder}/{file_name}"))
            numel = math.prod(int(length["as_int"]) for length in meta["sizes"])
            bytes_left -= 8 * numel
            if bytes_left < 0 or (numel and not data):
                raise Refusal("its tensors are larger than what it holds: it is damaged. Get the file again.")
        records[name] = json.dumps(config).encode()
    records.update({name: archive.read(name) for name in _HEADERS if name in archive})
    copy = io.BytesIO()
    with zipfile.ZipFile(copy, "w", zipfile.ZIP_STORED) as target:
        for name, data in records.items():
            target.writestr(f"model/{name}", data)
    return copy.getvalue()


def _check(value: Any, name: str) -> None:
    """Refuse what could run; forget what is only said about the program."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not _WORD.fullmatch(key) or (key in _OBJECTS and item):
                raise _needs_trust(f"the name `{key}`")
            if key in _DROPPED:
                value[key] = type(_DROPPED[key])()
            else:
                _check(item, key)
    elif isinstance(value, list):
        for item in value:
            _check(item, name)
    elif isinstance(value, str):
        if name in ("target", "as_operator"):
            if not _TARGET.fullmatch(value) or _FORBIDDEN_TARGETS.fullmatch(value):
                raise _needs_trust(f"the operator `{value}`")
        elif name == "expr_str":
            if not _is_harmless(value):
                raise _needs_trust(f"the size `{value}`")
        elif name in ("in_spec", "out_spec"):
            if value:
                _check_types(json.loads(value))
        elif not _WORD.fullmatch(value):
            raise _needs_trust(f"the name `{value}`")


def _is_harmless(expression: str) -> bool:
    return (
        bool(_EXPRESSION.fullmatch(expression))
        and "**" not in expression.replace(" ", "")
        and all(
            word in _FUNCTIONS or _SYMBOL.fullmatch(word) or (word.isdecimal() and len(word) <= 18)
            for word in re.findall(r"\w+", expression)
        )
    )


def _check_types(value: Any) -> None:
    """Only types of the standard library, so that none is imported."""
    if isinstance(value, dict):
        if value.get("type") not in _TYPES:
            raise _needs_trust(f"the type `{value.get('type')}`")
        for item in value.values():
            _check_types(item)
    elif isinstance(value, list):
        for item in value:
            _check_types(item)


def _needs_trust(what: str) -> Refusal:
    return Refusal(
        f"its program has {what}, and loading that could run code. Convert the model that it was exported from, or "
        "pass --trust (trust=True), which runs it."
    )


def _read_json(archive: Archive, name: str) -> Any:
    content = archive.read(name)
    if len(content) > _MAX_JSON:
        raise Refusal(f"its entry `{name}` is too large. Get the file again.")
    return json.loads(content)
