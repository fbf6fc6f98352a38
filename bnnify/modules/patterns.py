"""Globs over qualified names, in an order, looked up in about the same time however many there are."""

__all__ = ["Patterns"]

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

_SPECIAL = re.compile(r"[*?[]")


class Patterns:
    """Globs, as of :func:`fnmatch.fnmatchcase`, in an order. One with ``*``, ``?`` or ``[`` also matches itself."""

    def __init__(self, globs: Iterable[str]) -> None:
        self.globs = tuple(globs)
        self._by_start: dict[str, list[int]] = {}
        for position, glob in enumerate(self.globs):
            # What stands before the first special character must stand there in the name too.
            for start in {_SPECIAL.split(glob, maxsplit=1)[0], glob}:
                self._by_start.setdefault(start, []).append(position)
        self._lengths = sorted({len(start) for start in self._by_start})
        self._found: dict[str, frozenset[int]] = {}

    def matching(self, name: str) -> frozenset[int]:
        """Return the positions of the globs that match ``name``."""
        if name not in self._found:
            candidates = (
                position
                for length in self._lengths
                if length <= len(name)
                for position in self._by_start.get(name[:length], ())
            )
            self._found[name] = frozenset(
                position
                for position in candidates
                if self.globs[position] == name or fnmatchcase(name, self.globs[position])
            )
        return self._found[name]
