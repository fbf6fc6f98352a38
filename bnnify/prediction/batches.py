"""The rule for data: tell one batch from what gives batches, and take a model's arguments and the target from it."""

__all__ = [
    "Arguments",
    "as_arguments",
    "batches_of",
    "called_with",
    "check_batches",
    "choose",
    "count_batches",
    "is_one_batch",
    "labelled_batches_of",
    "rows_of",
]

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from ..errors import ArgumentError, ArgumentTypeError, describe
from .devices import devices_of, placed

Arguments: TypeAlias = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional and keyword arguments of a model."""

_TARGET = "labels"
"""The key of the target in a batch that is a mapping, as in transformers."""

_MISSING: Any = object()


def is_one_batch(data: Any) -> bool:
    """Tell one batch from what gives batches.

    One batch is a tensor, a tuple (of arguments), a mapping (of keyword arguments), text, an object with a method
    ``to``, or one that is not iterable. Everything else gives batches: a loader, a generator, a list.

    Raises:
        ArgumentTypeError: It may be either: a list of tensors that are not alike, or of things of several kinds, may be
            one batch ``[inputs, target]``. Or it gives single examples: a ``Dataset``.
    """
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise ArgumentTypeError(
            f"A {type(data).__name__} gives single examples. Make batches: DataLoader(dataset, 64)."
        )
    if isinstance(data, list):
        return _is_one_list(data)
    if isinstance(data, (str, bytes, tuple, Mapping)) or hasattr(data, "to") or hasattr(data, "__array__"):
        return True
    return not (hasattr(data, "__iter__") or (hasattr(data, "__getitem__") and hasattr(data, "__len__")))


def _is_one_list(data: list[Any]) -> bool:
    if _is_text(data):
        return True
    tensors = [element for element in data if isinstance(element, Tensor)]
    if len(tensors) == len(data):
        alike = len({(tensor.dtype, tensor.shape[1:]) for tensor in tensors}) <= 1
    else:
        alike = len({_kind(element) for element in data}) == 1
    if alike:
        return False
    raise ArgumentTypeError(
        f"A list is read as batches, and this one, {_described_batch(data)}, looks like one batch that a loader gave. "
        "If it is, pass its input alone, as batch[0], or a tuple of the model's arguments, and where batches are "
        "needed [batch]. If these are batches, pass iter(batches)."
    )


def _kind(element: Any) -> type:
    """The type of an element; lists and tuples count as one type, and so do all mappings."""
    if isinstance(element, (list, tuple)):
        return list
    return Mapping if isinstance(element, Mapping) else type(element)


def _is_text(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(part, str) for part in value)


def _is_tuple(value: Any) -> bool:
    """Tell a tuple of things from text, and from one thing that is a tuple inside (``PackedSequence``)."""
    return isinstance(value, tuple) and not hasattr(value, "to") and not _is_text(value)


def check_batches(data: Any, caller: str) -> None:
    """Raise an ArgumentTypeError if ``data`` is one batch, or single examples, where ``caller`` needs batches."""
    if is_one_batch(data):
        raise ArgumentTypeError(
            f"{caller} takes what gives batches, a loader, a generator or a list such as [(inputs, target)], and not "
            f"{describe(data)}."
        )


def count_batches(data: Any) -> int | None:
    """Count the batches; None if their number is not known, as for a generator."""
    if is_one_batch(data):
        return 1
    try:
        return len(data)
    except TypeError:  # a generator, or a loader over a stream
        return None


def as_arguments(inputs: Any) -> Arguments:
    """Read a tuple as arguments, a mapping as keyword arguments, and anything else as the only argument."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if _is_tuple(inputs) else (inputs,)), {}


def batches_of(data: Any, module: nn.Module) -> Iterator[Arguments]:
    """Yield the arguments of ``module`` for each batch, by the rule of :func:`bnnify.prediction.predict`.

    One batch is used as it stands. What gives batches is read once, and each of them moved to the model's device.

    Raises:
        ArgumentTypeError: A batch has three elements or more, which does not tell which of them are inputs.
    """
    if is_one_batch(data):
        yield as_arguments(data)
        return
    devices = devices_of(module)
    for batch in data:
        inputs, _ = _split(batch)
        yield as_arguments(placed(inputs, devices))


def labelled_batches_of(data: Any, module: nn.Module, caller: str) -> Iterator[tuple[Arguments, Any]]:
    """Yield the arguments of ``module`` and the target for each batch, by the rule of :func:`batches_of`.

    Raises:
        ArgumentTypeError: ``data`` is one batch, or a batch has three elements or more.
        ArgumentError: A batch has no target.
    """
    check_batches(data, caller)
    devices = devices_of(module)
    for batch in data:
        inputs, target = _split(batch)
        if target is _MISSING:
            raise ArgumentError(
                f"{caller} needs batches (input, target), or mappings with `{_TARGET}`; the loader gave "
                f"{_described_batch(batch)}. Make pairs, for example ((batch.x, batch.y) for batch in loader)."
            )
        inputs, target = placed((inputs, target), devices)
        yield as_arguments(inputs), target


def _split(batch: Any) -> tuple[Any, Any]:
    """Split a batch of a loader into inputs and target."""
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key != _TARGET}, batch.get(_TARGET, _MISSING)
    if not (_is_tuple(batch) or isinstance(batch, list)) or _is_text(batch):
        return batch, _MISSING
    if len(batch) in (1, 2):
        return batch[0], batch[1] if len(batch) == 2 else _MISSING
    raise ArgumentTypeError(
        f"{_described_batch(batch)} does not tell which of its elements are inputs. Give (inputs, target), with a "
        "tuple where the model takes several inputs: for example (((x, t), y) for x, t, y in loader), or "
        "((x, y) for x, y, weight in loader)."
    )


def _described_batch(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} with the keys {list(batch)}"
    if isinstance(batch, (list, tuple)):
        return f"a batch of {len(batch)} ({', '.join(map(describe, batch[:4]))})"
    return describe(batch)


def rows_of(arguments: Arguments) -> int | None:
    """The number of examples: the first dimension of the first tensor among the arguments; None without one."""
    args, kwargs = arguments
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim > 0]
    return len(tensors[0]) if tensors else None


@contextmanager
def called_with(module: nn.Module, arguments: Arguments) -> Iterator[None]:
    """Explain a TypeError of the call of ``module`` in this block: what it was called with, and by what rule.

    Raises:
        ArgumentTypeError: The block raised a TypeError.
    """
    try:
        yield
    except TypeError as error:
        args, kwargs = arguments
        given = [*map(describe, args), *(f"{name}={describe(value)}" for name, value in kwargs.items())]
        raise ArgumentTypeError(
            f"{type(module).__name__}, called with ({', '.join(given)}), raised: {str(error).rstrip('.')}. "
            "What the model is called with: a tensor or an object; each element of a tuple; each value of a mapping by "
            "its name. Of a loader's batch (inputs, target), or of a mapping with `labels`, only the inputs; several "
            "inputs are a tuple, as in (((x, t), y) for x, t, y in loader)."
        ) from error


def choose(found: Any, output: str | int | Callable[[Any], Any] | None) -> Any:
    """Choose a part of a model's output by a key or attribute, an index, or a function; None for all of it.

    Raises:
        ArgumentError: It has no such part.
        ArgumentTypeError: ``output`` is of another type.
    """
    if output is None:
        return found
    if callable(output):
        return output(found)
    if isinstance(output, bool) or not isinstance(output, (str, int)):
        raise ArgumentTypeError(f"output must be a key, an attribute, an index or a function, not {describe(output)}.")
    if isinstance(found, Tensor) and isinstance(output, int):
        raise ArgumentError(
            f"output={output} of a single tensor would be one example of the batch. Leave output= out, or choose a "
            f"part with a function, such as lambda out: out[:, {output}]."
        )
    try:
        if isinstance(output, str) and not isinstance(found, Mapping):
            return getattr(found, output)
        return found[output]
    except (AttributeError, LookupError, TypeError) as error:
        keys = f" with the keys {list(found)}" if isinstance(found, Mapping) else ""
        raise ArgumentError(
            f"output={output!r} is no part of what the model returned, a {type(found).__name__}{keys}."
        ) from error
