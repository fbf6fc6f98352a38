"""The names that a pickle may have, and what becomes of them: plain data, tensors, and inert records of all else."""

__all__ = ["Storage", "Vocabulary", "storage_dtype"]

import struct
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...torch_internals import set_module_versions
from .archive import Refusal
from .checked import as_key, as_size, of_type
from .records import Instance, Name

# Beyond what the file holds, for tensors that were expanded or overlap.
_SPARE_BYTES = 64 << 20

_MAX_DIMENSIONS = 64

_QUANTIZED = ("torch.ao.", "torch.nn.quantized.", "torch.nn.intrinsic.", "torch.quantization.", "torch.nn.qat.")
_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
    "UntypedStorage": torch.uint8,
}
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_LAYOUTS = {str(value): value for value in vars(torch).values() if isinstance(value, torch.layout)}
_FORMATS = {"f2": "e", "f4": "f", "f8": "d", "b1": "?"} | dict(
    zip(("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"), "bhiqBHIQ", strict=True)
)
# They take the class of the object as their first argument.
_MAKERS_OF_ANY_CLASS = ("copyreg._reconstructor", "numpy.core.multiarray._reconstruct")
_OLD_NAMES = {"__builtin__": "builtins", "numpy._core.multiarray": "numpy.core.multiarray"}


@dataclass(eq=False, frozen=True)
class Storage:
    """Memory in which tensors lie."""

    untyped: torch.UntypedStorage
    dtype: torch.dtype


class Vocabulary:
    """Makes what one file, of this ``size`` in bytes, names, and bounds what its tensors may hold together."""

    def __init__(self, size: int) -> None:
        self._bytes_left = 4 * size + _SPARE_BYTES
        self._views: set[tuple[Any, ...]] = set()

    def named(self, module: str, attribute: str) -> Any:
        dotted = f"{_OLD_NAMES.get(module, module)}.{attribute}"
        if dotted in _DTYPES:
            return _DTYPES[dotted]
        if dotted.startswith(_QUANTIZED) or "_rebuild_qtensor" in dotted:
            raise Refusal(
                f"it is quantized (it names `{dotted}`). Convert the model as it was before, and quantize what "
                "collapse gives back."
            )
        return Name(dotted)

    def make(self, called: Any, arguments: tuple[Any, ...]) -> Any:
        """Make what a call gives: data and tensors by the table below, and a record of any other call."""
        name = of_type(called, Name, Instance).name
        if isinstance(called, Name) and name in _MAKERS:
            return _MAKERS[name](self, *arguments)
        if name in _MAKERS_OF_ANY_CLASS and arguments and isinstance(arguments[0], Name):
            return Instance(arguments[0].name, arguments)
        return Instance(name, arguments)

    def build(self, what: Any, state: Any) -> Any:
        if isinstance(what, Instance):
            what.state = state
        elif type(what) is OrderedDict:
            # The versions of the modules, which a state_dict carries as an attribute.
            versions = of_type(state, dict).get("_metadata")
            if versions is not None:
                set_module_versions(what, of_type(versions, dict, OrderedDict))
        elif type(what) is dict:  # argparse.Namespace, read as a dict
            what.update(of_type(state, dict))
        elif not isinstance(what, Tensor):  # a tensor's attributes are not weights
            raise Refusal(
                f"it gives a state to a {type(what).__name__}, which torch.save never does. Get the file again."
            )
        return what

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *more: Any, dtype: Any = None) -> Tensor:
        if len(more) > 1 and of_type(more[1], OrderedDict, dict, type(None)):
            raise Refusal("it holds a tensor with hooks, which are code. Save model.state_dict().")
        if len(more) > 2 and more[2]:
            raise Refusal("it holds a lazily conjugated or negated tensor. Save it after resolve_conj().")
        memory = of_type(storage, Storage)
        dtype = memory.dtype if dtype is None else of_type(dtype, torch.dtype)
        offset, size, stride = as_size(offset), tuple(map(as_size, size)), tuple(map(as_size, stride))
        if len(size) > _MAX_DIMENSIONS:
            raise Refusal("a tensor in it has more dimensions than torch allows: it is damaged. Get the file again.")
        numel, end = 1, offset + 1
        for length, step in zip(size, stride, strict=True):
            numel *= length
            end += (length - 1) * step
        if numel and end * dtype.itemsize > memory.untyped.nbytes():
            raise Refusal("a tensor in it reaches beyond its own data: it is damaged. Get the file again.")
        view = (memory.untyped.data_ptr(), offset, size, stride, dtype)
        if view not in self._views:
            self._views.add(view)
            self._bytes_left -= numel * dtype.itemsize
            if self._bytes_left < 0:
                raise Refusal("its tensors are expanded to many times its size. Save contiguous tensors instead.")
        return torch.empty(0, dtype=dtype, device=memory.untyped.device).set_(memory.untyped, offset, size, stride)

    def _parameter(self, data: Any, requires_grad: Any = True, *_: Any) -> nn.Parameter:
        data = of_type(data, Tensor, nn.Parameter)
        differentiable = data.is_floating_point() or data.is_complex()
        return nn.Parameter(data.detach(), requires_grad=differentiable and bool(requires_grad))

    def _subclass(self, function: Any, _: Any, arguments: Any, __: Any) -> Any:
        result = self.make(function, of_type(arguments, tuple))
        return of_type(result, Tensor, nn.Parameter)


def storage_dtype(dotted: str) -> torch.dtype | None:
    module, _, attribute = dotted.rpartition(".")
    return _STORAGES.get(attribute) if module in ("torch", "torch.cuda", "torch.storage") else None


def _encoded(_: Vocabulary, text: Any, encoding: Any) -> bytes:
    if encoding != "latin1":
        raise Refusal(f"it encodes text as {encoding!r}, which pickle never does. Get the file again.")
    return of_type(text, str).encode(encoding)


def _byte_array(_: Vocabulary, content: Any = b"", encoding: Any = "latin-1") -> bytearray:
    # Not an int, which would ask for that many bytes.
    return bytearray(content.encode("latin-1") if type(content) is str else of_type(content, bytes))


def _number(_: Vocabulary, dtype: Any, content: Any) -> Any:
    """Make a Python number of a NumPy scalar, if it is a number."""
    dtype = of_type(dtype, Instance)
    code, order = dtype.arguments[0], dtype.state[1]
    if code not in _FORMATS or order not in ("<", "|", "="):
        return Instance("numpy.core.multiarray.scalar", (dtype, content))
    (value,) = struct.unpack("<" + _FORMATS[code], of_type(content, bytes))
    return value


def _sparse(layout: Any, indices: Any, second: Any, third: Any, *more: Any) -> Tensor:
    """Make a sparse tensor, such as an adjacency matrix among the buffers; its indices are compared with its size."""
    of_type(layout, torch.layout)
    compressed = layout != torch.sparse_coo
    parts = [of_type(part, Tensor, nn.Parameter).detach() for part in (indices, second)]
    size = list(map(as_size, more[0] if compressed else third))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's, that compressed layouts are in beta state
        if compressed:
            values = of_type(third, Tensor, nn.Parameter).detach()
            return torch.sparse_compressed_tensor(
                parts[0], parts[1], values, size, layout=layout, check_invariants=True
            )
        tensor = torch.sparse_coo_tensor(parts[0], parts[1], size, check_invariants=True)
    return tensor.coalesce() if more and more[0] else tensor


_MAKERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda _, items=(): OrderedDict((as_key(k), v) for k, v in of_type(items, list, tuple)),
    "collections.Counter": lambda _, items=(): Counter(dict(of_type(items, dict))) if items else Counter(),
    "collections.defaultdict": lambda _, factory=None: {},
    "argparse.Namespace": lambda _: {},
    "builtins.set": lambda _, items=(): set(map(as_key, of_type(items, list, tuple))),
    "builtins.frozenset": lambda _, items=(): frozenset(map(as_key, of_type(items, list, tuple))),
    "builtins.list": lambda _, items=(): list(of_type(items, list, tuple)),
    "builtins.dict": lambda _: {},
    "builtins.int": lambda _: 0,
    "builtins.complex": lambda _, real, imaginary: complex(of_type(real, float), of_type(imaginary, float)),
    "builtins.bytearray": _byte_array,
    "_codecs.encode": _encoded,
    "numpy.dtype": lambda _, *arguments: Instance("numpy.dtype", arguments),
    "numpy.core.multiarray.scalar": _number,
    "torch.Size": lambda _, size=(): torch.Size(map(as_size, of_type(size, list, tuple))),
    "torch.device": lambda _, *arguments: torch.device(*arguments),
    "torch._utils._rebuild_tensor": Vocabulary._tensor,
    "torch._utils._rebuild_tensor_v2": Vocabulary._tensor,
    "torch._utils._rebuild_tensor_v3": lambda self, *given: self._tensor(*given[:4], dtype=given[6]),
    "torch._utils._rebuild_parameter": Vocabulary._parameter,
    "torch._utils._rebuild_parameter_with_state": Vocabulary._parameter,
    "torch._tensor._rebuild_from_type_v2": Vocabulary._subclass,
    "torch.Tensor": lambda *_: _refuse(
        "were written by torch before 0.4. Load it and save it again with a newer torch."
    ),
    "torch.nn.parameter.Parameter": Vocabulary._parameter,
    "torch._utils._rebuild_sparse_tensor": lambda _, layout, data: _sparse(layout, *of_type(data, tuple)),
    "torch.serialization._get_layout": lambda _, name: _LAYOUTS[of_type(name, str)],
    "torch._utils._rebuild_meta_tensor_no_storage": lambda *_: _refuse(
        "were saved on the meta device and have no values. Save the loaded model."
    ),
}


def _refuse(why: str) -> None:
    raise Refusal(f"its tensors {why}")
