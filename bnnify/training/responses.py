"""How much σ each parameter bears before the output of its layer moves as far as the data move it."""

__all__ = ["responses"]

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, ConversionError
from ..modules.known_forwards import known_forward
from ..prediction.batches import Arguments, batches_of, called_with, rows_of
from ..prediction.eval_mode import evaluating
from .module_state import ModuleState, cloned
from .response_probes import LinearProbe, TrialProbe, Trying


def responses(model: nn.Module, names: set[str], data: Any) -> dict[str, Tensor]:
    """Find the σ at which the noise of each parameter is as large as the signal of its layer, by the parameter's name.

    It is a number, or one for each output unit; what the data do not reach is left out. The model is in eval mode
    meanwhile, and afterwards as it was.

    Raises:
        ArgumentError: There are no data.
        ArgumentTypeError: It is not clear what of a batch are inputs.
        ConversionError: The model is on the meta device, or a module that is called again does not do the same again.
    """
    on_meta = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if on_meta is not None:
        raise ConversionError(
            f"ResponseStd runs the model, and its `{on_meta}` is on the meta device, without values. Load weights "
            "into the plain model, and convert that, as convert_checkpoint does."
        )
    generators = torch.random.fork_rng(range(torch.cuda.device_count()))
    with evaluating(model), torch.no_grad(), generators, _without_fast_path():
        batches = (batch for batch in batches_of(data, model) if rows_of(batch) != 0)
        first = next(batches, None)
        if first is None:
            raise ArgumentError("ResponseStd was given data without batches.")
        probes = _probes(model, names, lambda: _call(model, first))
        handles = [handle for module, found in probes.items() for probe in found for handle in probe.attach(module)]
        try:
            for batch in chain([first], batches):
                _call(model, batch)
        finally:
            for handle in handles:
                handle.remove()
    return {name: response for found in probes.values() for probe in found for name, response in probe.result().items()}


def _call(model: nn.Module, batch: Arguments) -> None:
    """Call the model with a copy of a batch, which it may change in place, and leave it as it was."""
    args, kwargs = cloned(batch)
    state = ModuleState(model)
    try:
        with called_with(model, batch):
            model(*args, **kwargs)
    finally:
        state.restore()


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """Let transformer layers of torch call what is in them, as they do in train mode."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


_Probes: TypeAlias = dict[nn.Module, list[LinearProbe | TrialProbe]]


def _probes(model: nn.Module, names: set[str], run: Callable[[], Any]) -> _Probes:
    """Choose where each parameter is observed: at its own layer if that is called, else at the closest around it."""
    called: set[nn.Module] = set()
    hooks = [module.register_forward_hook(lambda module, *_: called.add(module)) for module in model.modules()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    modules = dict(model.named_modules(remove_duplicate=False))
    trying = Trying()
    probes: _Probes = {}
    trials: dict[tuple[nn.Module, str], dict[str, str]] = {}
    for name in sorted(names):
        holder, _, attribute = name.rpartition(".")
        path = f".{holder}.".partition(".parametrizations.")[0].strip(".")
        layer = modules[path]
        cls = getattr(type(layer), "_plain_class", type(layer))
        forward = known_forward(cls) if layer in called and "forward" not in vars(layer) else None
        if forward and path == holder and attribute in ("weight", "bias"):
            linear = next((probe for probe in probes.get(layer, []) if isinstance(probe, LinearProbe)), None)
            if linear is None:
                linear = LinearProbe(layer, path, forward, trying)
                probes.setdefault(layer, []).append(linear)
            linear.attributes.add(attribute)
            continue
        while modules[path] not in called and path:
            path = path.rpartition(".")[0]
        if modules[path] in called:
            trials.setdefault((modules[path], path), {})[name.removeprefix(path).lstrip(".")] = name
    for (module, path), parameters in trials.items():
        probes.setdefault(module, []).append(TrialProbe(path, parameters, trying))
    return probes
