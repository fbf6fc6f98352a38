"""The file formats that hold tensors: torch's zip files, its older files, and safetensors."""

__all__ = [
    "SAFETENSORS_METADATA",
    "OpenFile",
    "import_safetensors",
    "is_safetensors",
    "read_legacy",
    "read_safetensors",
    "read_zip",
]

import io
import json
import mmap
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .archive import Archive, Refusal
from .records import record_in
from .unpickler import Unpickler

SAFETENSORS_METADATA = "__metadata__"
_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_MAX_HEADER = 16 << 20


class OpenFile:
    """An ordinary file that is open for reading, and its length.

    Raises:
        Refusal: It is something else, is empty, or may not be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for somebody to write into it
                raise Refusal("it is not an ordinary file.")
            self.file: BinaryIO = open(path, "rb")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise Refusal(f"{reason[:1].lower()}{reason[1:]}.") from error
        self.size = os.fstat(self.file.fileno()).st_size
        if not self.size:
            self.file.close()
            raise Refusal("it is empty. Get the file again.")

    def __enter__(self) -> "OpenFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def head(self, length: int) -> bytes:
        """Read the first bytes of the file."""
        self.file.seek(0)
        return self.file.read(length)


def read_zip(source: OpenFile, archive: Archive) -> Any:
    """Read what torch.save wrote as a zip file, mapped into memory."""
    if "byteorder" in archive and archive.read("byteorder") != b"little":
        raise Refusal("it was written on a big-endian machine. Load it there and save it as safetensors.")
    mapped: Any = None
    loaded: dict[str, torch.UntypedStorage] = {}

    def load_storage(dtype: torch.dtype, key: str, numel: int) -> torch.UntypedStorage:
        nonlocal mapped
        name = f"data/{key}"
        if name not in loaded:
            start, size = archive.place(name)
            if mapped is None:
                mapped = torch.UntypedStorage.from_file(str(source.path), False, source.size)
            part = mapped[start : start + size]
            # torch aligns each record; what is not aligned cannot be read as it stands on every processor.
            loaded[name] = part if start % dtype.itemsize == 0 else part.clone()
        if numel * dtype.itemsize > loaded[name].nbytes():
            raise Refusal(f"its entry `{name}` is shorter than its tensors: it is damaged. Get the file again.")
        return loaded[name]

    return Unpickler(io.BytesIO(archive.read("data.pkl")), source.size, load_storage).load()


def read_legacy(source: OpenFile) -> Any:
    """Read what torch.save wrote before 1.6 into memory."""
    loaded: dict[str, torch.UntypedStorage] = {}
    bytes_left = source.size

    def load_storage(dtype: torch.dtype, key: str, numel: int) -> torch.UntypedStorage:
        nonlocal bytes_left
        if key not in loaded:
            bytes_left -= numel * dtype.itemsize
            if bytes_left < 0:
                raise Refusal("it claims to hold more than it is long: it was cut off or damaged. Get the file again.")
            loaded[key] = torch.UntypedStorage(numel * dtype.itemsize)
        return loaded[key]

    source.file.seek(0)
    header = Unpickler(source.file, source.size)
    if (first := header.load()) != _MAGIC_NUMBER or header.load() != _PROTOCOL:
        of = f" of a `{record}`" if (record := record_in(first)) else ""
        raise Refusal(f"it is a pickle{of}, but torch.save did not write it. Save model.state_dict() with torch.save.")
    header.load()  # the size of integers on the machine that wrote it
    content = Unpickler(source.file, source.size, load_storage).load()
    keys = header.load()
    if type(keys) is not list or not all(type(key) is str for key in keys) or set(keys) != set(loaded):
        raise Refusal("its list of tensors is damaged. Get the file again.")
    _fill(source, keys, loaded)
    return content


def _fill(source: OpenFile, keys: list[Any], loaded: dict[str, torch.UntypedStorage]) -> None:
    """Copy what follows after the pickles into the storages: for each its number of elements, and these."""
    with mmap.mmap(source.file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        position = source.file.tell()
        for key in keys:
            numel = int.from_bytes(mapped[position : position + 8], "little")
            position += 8
            length = loaded[key].nbytes()
            if position + length > source.size or (numel == 0) != (length == 0) or (numel and length % numel):
                raise Refusal("it was cut off or damaged. Get the file again.")
            if length:
                # Through a tensor over the mapped file, so that the data is there once.
                tensor = torch.frombuffer(mapped, dtype=torch.uint8, count=length, offset=position)
                torch.empty(0, dtype=torch.uint8, device="cpu").set_(loaded[key]).copy_(tensor)
                del tensor
            position += length


def read_safetensors(source: OpenFile) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors of a safetensors file, mapped into memory, and its metadata."""
    length = int.from_bytes(source.head(8), "little")
    if length > min(_MAX_HEADER, source.size - 8):
        raise Refusal("its header is longer than it can be: it was cut off or damaged. Get the file again.")
    safe_open = import_safetensors().safe_open
    header = json.loads(source.file.read(length), object_pairs_hook=_without_duplicates)
    with safe_open(source.path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata() or {}
    # In the order in which they stand in the file.
    return {name: tensors[name] for name in header if name in tensors}, metadata


def import_safetensors() -> Any:
    """Import the library safetensors."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise Refusal("the library safetensors is missing. Install it: pip install safetensors") from error
    return safetensors


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise Refusal("a name in its header is there twice: it is damaged. Get the file again.")
    return result


def is_safetensors(source: OpenFile) -> bool:
    """Tell whether it looks like a safetensors file: the length of a header and its opening brace."""
    head = source.head(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") <= source.size
