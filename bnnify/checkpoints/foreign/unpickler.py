"""Read pickles without running them: what a file names is never imported, and becomes data or an inert record.

torch's own ``weights_only`` unpickler runs no foreign code either, but it allocates and hashes what a file asks for:
``bytearray(10**11)``, a dict keyed by a deeply nested tuple.
"""

__all__ = ["Unpickler"]

import pickletools
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

import torch

from .allowed_names import Storage, Vocabulary, storage_dtype
from .archive import Refusal
from .checked import as_key, as_size, of_type
from .records import Instance, Name

# Bounds what a small file can make of itself: an empty set takes 216 bytes of memory and one in the file.
_MAX_OPERATIONS = 10_000_000


class Unpickler:
    """Read one pickle after the other from ``file``.

    Args:
        file: Where the pickles stand.
        size: The length of the whole file, with which what the tensors may occupy is compared.
        load_storage: ``(dtype, key, numel) -> UntypedStorage``, for what the file keeps outside of the pickle.
    """

    def __init__(
        self,
        file: BinaryIO,
        size: int,
        load_storage: Callable[[torch.dtype, str, int], torch.UntypedStorage] | None = None,
    ) -> None:
        self.file = file
        self._load_storage = load_storage
        self._operations = 0
        self.vocabulary = Vocabulary(size)

    def load(self) -> Any:
        """Make the object that the next pickle describes.

        Raises:
            Refusal: It is quantized or damaged, or larger than a checkpoint can be.
            Exception: Whatever the reading of garbage leads to.
        """
        stack: list[Any] = []
        marks: list[list[Any]] = []
        memo: dict[int, Any] = {}
        argument: Any
        for operation, argument, _ in pickletools.genops(self.file):
            self._operations += 1
            if self._operations > _MAX_OPERATIONS:
                raise Refusal("it holds millions of small objects. Save the state_dict alone.")
            name = operation.name
            if name in _LITERALS:
                stack.append(_LITERALS[name](argument))
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif name == "MARK":
                marks.append(stack)
                stack = []
            elif name in ("APPENDS", "SETITEMS", "ADDITEMS", "TUPLE", "LIST", "DICT", "FROZENSET", "POP_MARK"):
                items, stack = stack, marks.pop()
                if name == "APPENDS":
                    _extend(stack[-1], items)
                elif name == "SETITEMS":
                    _set_items(stack[-1], zip(items[::2], items[1::2], strict=True))
                elif name == "ADDITEMS":
                    of_type(stack[-1], set).update(map(as_key, items))
                elif name == "TUPLE":
                    stack.append(tuple(items))
                elif name == "LIST":
                    stack.append(items)
                elif name == "DICT":
                    stack.append(dict(zip(map(as_key, items[::2]), items[1::2], strict=True)))
                elif name == "FROZENSET":
                    stack.append(frozenset(map(as_key, items)))
            elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
                length = int(name[-1])
                stack[-length:] = [tuple(stack[len(stack) - length :])]
            elif name == "APPEND":
                item = stack.pop()
                _extend(stack[-1], [item])
            elif name == "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set_items(stack[-1], [(key, value)])
            elif name == "GLOBAL":
                stack.append(self.vocabulary.named(*argument.split(" ", 1)))
            elif name == "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(self.vocabulary.named(of_type(module, str), of_type(attribute, str)))
            elif name == "BINPERSID":
                stack.append(self._persistent(stack.pop()))
            elif name in ("REDUCE", "NEWOBJ"):
                arguments = of_type(stack.pop(), tuple)
                stack.append(self.vocabulary.make(stack.pop(), arguments))
            elif name == "BUILD":
                state = stack.pop()
                stack[-1] = self.vocabulary.build(stack[-1], state)
            elif name == "POP":
                stack.pop()
            elif name == "STOP":
                return stack.pop()
            elif name not in ("PROTO", "FRAME"):
                raise Refusal(
                    f"its pickle has the operation {name}, which torch.save never writes. Get the file again."
                )
        raise Refusal("it was cut off. Get the file again.")

    def _persistent(self, identifier: Any) -> Any:
        kind, *rest = of_type(identifier, tuple)
        if kind == "module":  # in files of torch before 1.6: a class, with its source
            return of_type(rest[0], Name)
        if kind != "storage" or self._load_storage is None:
            raise Refusal("it refers to something outside of itself that is not a tensor. Get the file again.")
        named, key, location, numel, *view = rest
        if location == "meta":
            raise Refusal("its tensors were saved on the meta device and have no values. Save the loaded model.")
        dtype = storage_dtype(of_type(named, Name).name)
        if dtype is None:
            raise Refusal("its tensors are of a kind that is no longer there. Get the file again.")
        if view and view[0] is not None:
            raise Refusal("its tensors were written by torch before 0.4. Load it and save it again with a newer torch.")
        return Storage(self._load_storage(dtype, of_type(key, str), as_size(numel)), dtype)


def _extend(what: Any, items: list[Any]) -> None:
    """Append to a list; what a list of another class holds is of no use without the class."""
    if not isinstance(what, Instance):
        of_type(what, list).extend(items)


def _set_items(what: Any, items: Iterable[tuple[Any, Any]]) -> None:
    """Put items into a mapping; what a mapping of another class holds is of no use without the class."""
    if not isinstance(what, Instance):
        mapping = of_type(what, dict, OrderedDict, Counter)
        for key, value in items:
            mapping[as_key(key)] = value


def _text(value: str) -> Any:
    """Decode a string of Python 2, which pickletools takes for Latin-1."""
    data = value.encode("latin-1")
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _itself(value: Any) -> Any:
    return value


_LITERALS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINFLOAT"), _itself),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "LONG4"), _itself),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"), _itself),
    **dict.fromkeys(("SHORT_BINSTRING", "BINSTRING"), _text),
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_TUPLE": lambda _: (),
    "EMPTY_LIST": lambda _: [],
    "EMPTY_DICT": lambda _: {},
    "EMPTY_SET": lambda _: set(),
}
