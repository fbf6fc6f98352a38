"""NumPy's ``.npz``: one array of inputs, one of targets."""

__all__ = ["read_arrays"]

import torch

from ...errors import ArgumentError, needing
from .examples import Examples, Request
from .tables import targets_of

_TARGETS = ("y", "target", "targets", "label", "labels")


def read_arrays(source: str, request: Request) -> Examples:
    """Read the array that is not the target as the inputs, in float32 if it holds real numbers.

    Raises:
        ArgumentError: It cannot be read, or it is not clear which array is which.
    """
    with needing("numpy", f"To read `{source}`"):
        import numpy
    try:
        with numpy.load(source, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:
        raise ArgumentError(f"Cannot read the arrays in `{source}`: {error}.") from error
    names = [request.target] if request.target is not None else [name for name in _TARGETS if name in arrays]
    target = names[0] if names and names[0] in arrays else None
    if target is None and (request.labelled is not False or len(arrays) != 1):
        raise ArgumentError(f"Say with --target which array of `{source}` is the target; it has {', '.join(arrays)}.")
    inputs = [name for name in arrays if name != target]
    if len(inputs) != 1:
        raise ArgumentError(f"`{source}` must hold one array of inputs beside the target, and has {', '.join(arrays)}.")
    found = torch.from_numpy(arrays[inputs[0]])
    found = found.float() if found.is_floating_point() else found
    labels = None if target is None else arrays[target]
    if labels is not None and len(labels) != len(found):
        raise ArgumentError(f"`{source}` has {len(found)} inputs and {len(labels)} targets.")
    names_of_rows = [str(number) for number in range(len(found))]
    if labels is not None and labels.ndim > 1:
        return Examples(found.__getitem__, names_of_rows, torch.from_numpy(labels))
    targets, classes = targets_of(source, None if labels is None else labels.tolist(), request)
    return Examples(found.__getitem__, names_of_rows, targets, classes)
