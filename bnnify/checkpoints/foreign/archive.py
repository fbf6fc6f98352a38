"""The zip files of torch.save, with everything checked that torch always writes the same way."""

__all__ = ["Archive", "Refusal"]

import struct
import zipfile
import zlib
from typing import BinaryIO

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCAL = struct.Struct("<4s5H3L2H")
_MAX_DIRECTORY = 16 << 20


class Refusal(Exception):
    """Why a file is not read, as the end of the sentence ``Cannot read FILE: …``."""


class Archive:
    """The records of a zip file, none of which is compressed, repeated, or overlaps another.

    So what the records claim to hold is no more than what the file is long.

    Args:
        file: The open file.
        size: Its length in bytes.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file = file
        directory = _directory_offset(file, size)
        with zipfile.ZipFile(file) as archive:
            entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        roots = {entry.filename.partition("/")[0] for entry in entries}
        if len(roots) != 1:
            raise Refusal("it is a zip archive, but torch.save did not write it. Extract the checkpoint from it first.")
        names = {entry.filename.partition("/")[2] for entry in entries}
        if "constants.pkl" in names or any(name.startswith("code/") for name in names):
            raise Refusal(
                "it is a TorchScript archive, which holds compiled code. Save the original model's state_dict(), or "
                "torch.jit.load(FILE).state_dict()."
            )
        self._places: dict[str, tuple[int, int, int]] = {}
        end = 0
        for entry in entries:
            name = entry.filename.partition("/")[2]
            encrypted = entry.flag_bits & 1
            if encrypted or entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                raise Refusal(
                    f"its entry `{entry.filename}` is compressed or encrypted, which torch.save never does. "
                    "Load it and save it again with torch."
                )
            if name in self._places:
                raise Refusal(f"its entry `{entry.filename}` is there twice. Get the file again.")
            start = self._data_offset(entry.header_offset)
            if entry.header_offset < end or start + entry.file_size > directory:
                raise Refusal(f"its entry `{entry.filename}` overlaps another: it is damaged. Get the file again.")
            end = start + entry.file_size
            self._places[name] = (start, entry.file_size, entry.CRC)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def read(self, name: str) -> bytes:
        """Return the content of a record."""
        start, size = self.place(name)
        self.file.seek(start)
        return self.file.read(size)

    def place(self, name: str) -> tuple[int, int]:
        """Return where a record starts in the file, and its length, once its checksum has been compared."""
        if name not in self._places:
            raise Refusal(f"its entry `{name}` is missing: it is damaged. Get the file again.")
        start, size, expected = self._places[name]
        # torch can be told to write no checksums: then they are zero.
        if expected:
            self.file.seek(start)
            found, left = 0, size
            while left > 0 and (block := self.file.read(min(left, 1 << 20))):
                found = zlib.crc32(block, found)
                left -= len(block)
            if found != expected:
                raise Refusal(f"the checksum of its entry `{name}` is wrong: it is damaged. Get the file again.")
            self._places[name] = (start, size, 0)
        return start, size

    def _data_offset(self, header_offset: int) -> int:
        self.file.seek(header_offset)
        header = self.file.read(_LOCAL.size)
        if len(header) < _LOCAL.size or not header.startswith(b"PK\x03\x04"):
            raise Refusal("it is damaged: an entry does not start where it should. Get the file again.")
        *_, name_length, extra_length = _LOCAL.unpack(header)
        return header_offset + _LOCAL.size + int(name_length) + int(extra_length)


def _directory_offset(file: BinaryIO, size: int) -> int:
    """Return where the list of entries starts, once it is known to be short enough to be read."""
    file.seek(max(0, size - _END.size))
    end = file.read()
    if not end.startswith(b"PK\x05\x06") or len(end) < _END.size:
        raise Refusal("its end is missing: it was cut off. Get the file again.")
    _, _, _, _, _, length, offset, _ = _END.unpack(end)
    file.seek(max(0, size - _END.size - _END64_LOCATOR.size))
    signature, _, end64_offset, _ = _END64_LOCATOR.unpack(file.read(_END64_LOCATOR.size))
    if signature == b"PK\x06\x07":
        file.seek(min(end64_offset, size))
        end64 = file.read(_END64.size)
        if len(end64) < _END64.size or not end64.startswith(b"PK\x06\x06"):
            raise Refusal("its list of entries is damaged. Get the file again.")
        *_, length, offset = _END64.unpack(end64)
    if length > _MAX_DIRECTORY or offset + length > size:
        raise Refusal("its list of entries is damaged. Get the file again.")
    return int(offset)
