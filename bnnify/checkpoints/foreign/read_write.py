"""Read any checkpoint safely, and write a plain state_dict back as it was found."""

__all__ = ["Checkpoint", "is_sharded", "not_finite", "read", "read_shards", "write"]

import math
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...torch_internals import save_in_old_format
from ..atomic import replace_atomically
from . import hugging_face, program_file
from .archive import Archive, Refusal
from .content import Checkpoint, from_content
from .explained import explained
from .formats import (
    SAFETENSORS_METADATA,
    OpenFile,
    import_safetensors,
    is_safetensors,
    read_legacy,
    read_safetensors,
    read_zip,
)
from .layout import Layout, find, put_back

# What a file of another kind begins with, and what to do about it.
_OTHER_FILES = {
    b"version https://git-lfs": "it is a Git LFS pointer, not the weights. Run: git lfs pull",
    b"GGUF": "it is a GGUF file, whose weights are quantized. Convert the checkpoint that it was made from.",
    b"\x89HDF\r\n": "it is an HDF5 file, such as Keras writes. Load it into a PyTorch model and save its state_dict.",
    b"\x93NUMPY": "it is a NumPy array. Load it into a PyTorch model and save its state_dict.",
    b"\x1f\x8b": "it is compressed with gzip. Extract it first.",
    b"<": "it is a web page or XML, not a checkpoint: the download failed. Get the file again.",
}
_OTHER_SUFFIXES = {
    ".onnx": "it is an ONNX file. Convert the PyTorch model that it was exported from.",
    ".pb": "it is a TensorFlow file. Load it into a PyTorch model and save its state_dict.",
    ".tflite": "it is a TensorFlow Lite file. Load it into a PyTorch model and save its state_dict.",
}


def read(
    path: str | os.PathLike[str], *, key: str | None = None, names: Collection[str] | None = None, trust: bool = False
) -> Checkpoint:
    """Read a checkpoint of unknown origin.

    A state_dict or a training checkpoint that torch.save wrote in any of its formats; a pickled module, of torch or
    torchvision if ``names`` are not given; safetensors; a ``*.index.json`` with its shards; a Hugging Face model
    directory; an exported program. The state_dict is found by its structure: a mapping of names to tensors. Where there
    are several, it is the one that ``key`` says, else the only one that has all of ``names``, else the only one under a
    usual key such as ``state_dict`` or ``model``. Without ``names``, prefixes of wrappers are removed which all names
    begin with: ``module.``, ``_orig_mod.``, ``model.``, and in a Lightning checkpoint the attribute that is the model.
    An ``argparse.Namespace`` is read as a dict, a NumPy scalar as a number; whatever else stands beside the weights and
    is no plain data, such as a date or an optimizer, is left out.

    Args:
        path: The file or directory.
        key: Where the state_dict stands, as a dotted path such as ``"generator.state_dict"``.
        names: The names in the model's own state_dict. What the file has outside of their prefix is left in ``rest``.
        trust: Whether to unpickle everything, which runs the code that the file names.

    Raises:
        CheckpointError: It cannot be read, or not without running code.
    """
    path = Path(path)
    with explained(path):
        if "\0" in str(path):
            raise Refusal("its name has a NUL character.")
        if hugging_face.is_adapter_file(path):
            path = path.parent
        if path.is_dir():
            shards, config = hugging_face.shards_of_folder(path)
            if config is not None and names is None:
                names = ()  # transformers needs them as they stand in the file
            return _joined(shards, key, names, trust, config)
        if is_sharded(path):
            return _joined(hugging_face.shards_of_index(path), key, names, trust, None)
        return _read_file(path, key, names, trust)


def is_sharded(path: str | os.PathLike[str]) -> bool:
    """Tell whether ``path`` is a directory of a model or the index of its shards."""
    return os.path.isdir(path) or os.fspath(path).endswith(".index.json")


def read_shards(path: str | os.PathLike[str]) -> Iterator[Checkpoint]:
    """Read the files of a sharded checkpoint one after another, each under the names that it has.

    The ``rest`` of each has the metadata of the index too.

    Raises:
        CheckpointError: As :func:`read`.
    """
    path = Path(path)
    with explained(path):
        shards = hugging_face.shards_of_folder(path)[0] if path.is_dir() else hugging_face.shards_of_index(path)
    yield from _each(shards, trust=False)


def write(path: str | os.PathLike[str], layout: Layout, state_dict: Mapping[str, Any], rest: Mapping[str, Any]) -> None:
    """Write a state_dict in the layout of the file that it came from.

    The file is complete or not there; one that exists is replaced. What was sharded becomes one file, and what was a
    pickled module or an exported program becomes a state_dict, with the ``rest`` of the original beside it. The names
    are those that the original had: other names of a tied parameter are left out, and so are counts of batches that it
    lacked.

    Raises:
        CheckpointError: The file cannot be written.
    """
    with explained(Path(path), "write"):
        content = put_back(layout, state_dict, rest)
        if layout.kind == "safetensors":
            safetensors = import_safetensors()
            metadata = content.pop(SAFETENSORS_METADATA, None)
            with replace_atomically(path) as file:
                safetensors.torch.save_file(_unshared(content), file.name, metadata)
        else:
            with replace_atomically(path) as file:
                (torch.save if layout.kind == "torch" else save_in_old_format)(content, file)


def not_finite(state_dict: Mapping[str, Any]) -> list[str]:
    """Name the tensors that have a NaN or an infinity in them."""
    return [name for name, value in state_dict.items() if isinstance(value, Tensor) and not _is_finite(value)]


def _is_finite(tensor: Tensor) -> bool:
    if tensor.layout != torch.strided:
        tensor = tensor.detach().coalesce().values() if tensor.layout == torch.sparse_coo else tensor.values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize == 1:  # no float8 can be compared
        tensor = tensor.float()
    # A NaN is the least and the greatest; unlike isfinite this takes no memory.
    return all(map(math.isfinite, (bound.item() for bound in torch.aminmax(tensor.detach()))))


def _read_file(path: Path, key: str | None, names: Collection[str] | None, trust: bool) -> Checkpoint:
    with OpenFile(path) as source:
        head = source.head(64)
        # First, because the length with which it begins may happen to begin as one of the others does.
        if path.suffix == ".safetensors" or is_safetensors(source):
            tensors, metadata = read_safetensors(source)
            state_dict, layout, rest = find(tensors, "safetensors", key, names)
            return Checkpoint(state_dict, layout, {**rest, SAFETENSORS_METADATA: metadata} if metadata else rest)
        if head.startswith(b"PK"):
            return _read_archive(source, key, names, trust)
        if head.startswith(b"\x80"):
            content = _unpickle_freely(path) if trust else read_legacy(source)
            return from_content(content, "torch-legacy", key, names)
    advice = next((text for start, text in _OTHER_FILES.items() if head.lstrip().startswith(start)), None)
    raise Refusal(
        advice
        or _OTHER_SUFFIXES.get(path.suffix.lower())
        or "it is neither a file of torch.save nor safetensors. Save model.state_dict() with torch.save."
    )


def _read_archive(source: OpenFile, key: str | None, names: Collection[str] | None, trust: bool) -> Checkpoint:
    archive = Archive(source.file, source.size)
    if program_file.is_program(archive):
        module = program_file.read_program(source, archive, trust)
        state_dict = module.state_dict()
        return Checkpoint(state_dict, Layout("torch", (), "", tuple(state_dict)), {}, module)
    if "data.pkl" not in archive:
        raise Refusal("it is a zip archive, but torch.save did not write it. Extract the checkpoint from it first.")
    content = _unpickle_freely(source.path) if trust else read_zip(source, archive)
    return from_content(content, "torch", key, names)


def _unpickle_freely(path: Path) -> Any:
    """Run whatever the file names, for those who trust it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=False)


def _joined(
    shards: hugging_face.Shards,
    key: str | None,
    names: Collection[str] | None,
    trust: bool,
    config: Mapping[str, Any] | None,
) -> Checkpoint:
    """Join the files of one checkpoint into one state_dict."""
    tensors: dict[str, Tensor] = {}
    kind, metadata = "torch", None
    for part in _each(shards, trust):
        kind = part.layout.kind
        metadata = part.rest.get(SAFETENSORS_METADATA)
        tensors |= part.state_dict
    state_dict, layout, rest = find(tensors, kind, key, names)
    if metadata:
        rest = {**rest, SAFETENSORS_METADATA: metadata}
    return Checkpoint(state_dict, layout, rest, None, config)


def _each(shards: hugging_face.Shards, trust: bool) -> Iterator[Checkpoint]:
    """Read one file after another, of each what is to be taken from it."""
    for path, expected in shards.files.items():
        with explained(path):
            # The names are needed as they stand in the file.
            part = _read_file(path, None, (), trust)
            for name in expected or ():
                if name not in part.state_dict:
                    raise Refusal(f"it lacks `{name}`, which the index says it has. Get the files again.")
        if expected is not None:
            part = replace(part, state_dict={name: part.state_dict[name] for name in expected})
        if part.layout.kind == "safetensors" and shards.metadata:
            metadata = {**part.rest.get(SAFETENSORS_METADATA, {}), **shards.metadata}
            part = replace(part, rest={**part.rest, SAFETENSORS_METADATA: metadata})
        yield part


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors with memory of their own, as safetensors needs them."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone().contiguous() if memory in seen else tensor.contiguous()
        seen.add(memory)
    return result
