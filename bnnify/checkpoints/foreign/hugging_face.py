"""Hugging Face model directories: several files with weights, and the config that says what model they are of."""

__all__ = ["Shards", "is_adapter_file", "shards_of_folder", "shards_of_index"]

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .archive import Refusal
from .formats import OpenFile

_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_MAX_JSON = 16 << 20


@dataclass(frozen=True)
class Shards:
    """The files that make up one checkpoint.

    Attributes:
        files: The names to take from each; None is all.
        metadata: The texts that the index holds beside the names.
    """

    files: Mapping[Path, Collection[str] | None]
    metadata: Mapping[str, str] = field(default_factory=dict)


def shards_of_folder(path: Path) -> tuple[Shards, dict[str, Any] | None]:
    """List the files with the weights in a model directory; read its config.

    The config is None where there is none, or one of another library, such as timm's. That of an adapter, which is only
    a part of a model, names its kind as ``peft_type``.
    """
    if adapters := [name for name in _ADAPTER if is_adapter_file(path / name)]:
        if any((path / name).exists() for name in _WEIGHTS):
            raise Refusal("it holds a model and an adapter. Put the adapter's files into a directory of their own.")
        adapter = {"peft_type": None} | _read_json(path / "adapter_config.json")
        return Shards({_within(path, adapters[0]): None}), adapter
    config = _read_json(path / "config.json") if (path / "config.json").exists() else None
    if config is not None and not config.keys() & {"architectures", "model_type"}:
        config = None
    for name in _WEIGHTS:
        if (path / name).exists():
            if name.endswith(".json"):
                return shards_of_index(path / name), config
            return Shards({_within(path, name): None}), config
    raise Refusal(f"it is a directory without {', '.join(_WEIGHTS[:3])}. Name the checkpoint file in it.")


def is_adapter_file(path: Path) -> bool:
    """Tell whether ``path`` is the file with the weights of an adapter, whose config stands beside it."""
    return path.name in _ADAPTER and path.exists() and path.with_name("adapter_config.json").exists()


def shards_of_index(path: Path) -> Shards:
    """List the files that an index names, all beside it."""
    content = _read_json(path)
    names, metadata = content.get("weight_map"), content.get("metadata")
    if not isinstance(names, dict) or not names:
        raise Refusal("it is no index of weights: it has no `weight_map`. Name the checkpoint file.")
    files: dict[Path, list[str]] = {}
    for name, file in names.items():
        files.setdefault(_within(path.parent, file), []).append(name)
    texts = metadata.items() if isinstance(metadata, dict) else ()
    return Shards(dict(files), {name: text for name, text in texts if isinstance(text, str)})


def _within(folder: Path, name: Any) -> Path:
    """Return the file ``name`` in ``folder``, and no other, wherever links lead."""
    if not isinstance(name, str) or not name or name in (".", "..") or set(name) & set("/\\:\0"):
        raise Refusal(f"it names the file {name!r}, which does not stand beside it. Get the files again.")
    if not name.endswith((".safetensors", ".bin", ".pt", ".pth")):
        raise Refusal(f"it names the file {name!r}, which is no checkpoint. Get the files again.")
    resolved, home = (folder / name).resolve(), folder.resolve()
    # The hub's cache has links: models--…/snapshots/<revision>/model.safetensors -> ../../blobs/<hash>
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if resolved.parent not in homes:
        raise Refusal(f"it names the file {name!r}, which is a link out of its directory. Name the checkpoint file.")
    return folder / name


def _read_json(path: Path) -> dict[str, Any]:
    with OpenFile(path) as source:
        if source.size > _MAX_JSON:
            raise Refusal(f"its `{path.name}` is too large. Get the files again.")
        content = json.loads(source.file.read())
    if not isinstance(content, dict):
        raise Refusal(f"its `{path.name}` holds no JSON object. Get the files again.")
    return content
