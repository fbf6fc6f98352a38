"""The report of a conversion: which parameters are Bayesian, and why the others are not."""

__all__ = ["ConversionReport", "Reason", "ReportEntry"]

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from math import prod


class Reason(Enum):
    """A reason to leave a parameter alone; the value is the sentence for it."""

    NOT_SELECTED = "not selected"
    EXCLUDED = "excluded"
    FROZEN = "frozen (requires_grad=False); name the parameter itself in `select` to convert it"
    OFF_BY_DEFAULT = "not converted by default"
    NOT_A_WEIGHT = (
        "no weights are known of this layer type, or this is none of them; name the parameter itself in `select`"
    )
    EMPTY = "it has no elements"
    QUANTIZED = "in a quantized layer, which has no floating-point weights to learn"
    UNKNOWN_LAYER = (
        "unknown layer type {layer}: register it with bnnify.register_layer({layer}, [{names}]) "
        "or name the parameter in `select`"
    )
    UNSUPPORTED = "unsupported: {why}"


@dataclass(frozen=True)
class ReportEntry:
    """One parameter of the model: Bayesian, or left alone for a reason.

    Attributes:
        name: The qualified name, such as ``layer1.0.conv1.weight``.
        module: The class of the module that holds it.
        shape: Its shape.
        bayesian: True if it is Bayesian now.
        reason: The reason to leave it alone, as a sentence; empty for a Bayesian parameter.
        settings: Estimator, prior and initial σ of a Bayesian parameter; empty otherwise.
        memory: The bytes of the parameter itself.
        added_memory: The bytes of its ρ, and of the mean of its prior if that is kept.
        unsupported: True if it was left alone for lack of support, rather than by choice.
    """

    name: str
    module: str
    shape: tuple[int, ...]
    bayesian: bool
    reason: str = ""
    settings: str = ""
    memory: int = 0
    added_memory: int = 0
    unsupported: bool = False

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class ConversionReport:
    """Every parameter of the model, in order; printing it gives a table.

    In the table the parameters of a layer share a row, as do like layers of several blocks: ``layer1.{0-2}.conv1``.

    Attributes:
        entries: One entry for each parameter; a tied one appears once.
        untrained: The name of the last converted layer if its weights look as an initialisation left them and nobody
            gave its prior, else empty, as after loading. A ``Pretrained`` prior then leaves the weights of the whole
            model room to move.
        tuning: What :func:`bnnify.tune_std` did to σ last, as a sentence; empty if it was not called.
    """

    entries: tuple[ReportEntry, ...] = field(default_factory=tuple)
    untrained: str = ""
    tuning: str = ""

    @property
    def bayesian(self) -> tuple[ReportEntry, ...]:
        """The parameters that are Bayesian."""
        return tuple(entry for entry in self.entries if entry.bayesian)

    @property
    def left_alone(self) -> tuple[ReportEntry, ...]:
        """The parameters that are not, each with its reason."""
        return tuple(entry for entry in self.entries if not entry.bayesian)

    @property
    def share(self) -> float:
        """The share of the model's weights that is Bayesian, from 0 to 1."""
        return _numel(self.bayesian) / max(_numel(self.entries), 1)

    @property
    def memory_before(self) -> int:
        """The bytes of the parameters before the conversion."""
        return sum(entry.memory for entry in self.entries)

    @property
    def memory_after(self) -> int:
        """The bytes of the parameters with ρ and the means of priors."""
        return self.memory_before + sum(entry.added_memory for entry in self.entries)

    def __str__(self) -> str:
        by_verdict: dict[str, list[ReportEntry]] = {}
        for entry in self.entries:
            verdict = f"Bayesian: {entry.settings}" if entry.bayesian else f"Left alone: {entry.reason}"
            by_verdict.setdefault(verdict, []).append(entry)
        tables = {verdict: _rows(entries) for verdict, entries in by_verdict.items()}
        rows = [row for table in tables.values() for row in table]
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(len(rows[0]) if rows else 0)]
        lines: list[str] = []
        for verdict, table in tables.items():
            lines += ["", verdict] if lines else [verdict]
            for *cells, last in table:
                padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=False)]
                lines.append("  ".join(["", *padded, last.rjust(widths[-1])]))
        count, total = _numel(self.bayesian), _numel(self.entries)
        return "\n".join(
            [
                *lines,
                "",
                f"{len(self.bayesian)} of {len(self.entries)} parameters Bayesian, "
                f"{count:,} of {total:,} weights ({self.share:.1%})",
                f"memory of the parameters: {_size(self.memory_before)} before, {_size(self.memory_after)} after",
                *([_FROM_SCRATCH.format(self.untrained)] if self.untrained else []),
                *([f"tuned: {self.tuning}"] if self.tuning else []),
            ]
        )


_FROM_SCRATCH = (
    "`{}` looks untrained, so a Pretrained() prior is wide.\n"
    "From scratch, train ρ no faster than the means (rho_lr=lr), and let the weight of the KL rise (linear_warmup)."
)


def _rows(entries: list[ReportEntry]) -> list[tuple[str, ...]]:
    """One row for all layers that are alike: layer, class, parameters with their shapes, and number of weights."""
    layers: dict[tuple[str, str], list[ReportEntry]] = {}
    for entry in entries:
        layers.setdefault((entry.name.rpartition(".")[0], entry.module), []).append(entry)
    alike: dict[tuple[str, ...], dict[str, int]] = {}
    for (layer, module), parameters in layers.items():
        described = ", ".join(f"{entry.name.rpartition('.')[2]} {list(entry.shape)}" for entry in parameters)
        alike.setdefault((_INDEX.sub("#", layer), module, described), {})[layer] = _numel(parameters)
    return [
        (_merged(names), module, described, f"{sum(counts[name] for name in names):,}")
        for (_, module, described), counts in alike.items()
        for names in _grids(list(counts))
    ]


_INDEX = re.compile(r"\d+(?=\.)|(?<![^._])\d+$")
"""The number of a block: 3 in ``blocks.3.mlp``, ``layer3.conv`` and ``encoder_layer_3``, but not in ``layer.conv3``."""


def _grids(names: list[str]) -> list[list[str]]:
    """Divide names that differ in their indices until each group has every combination of its indices."""
    indices = [_INDEX.findall(name) for name in names]
    varying = [position for position, values in enumerate(zip(*indices, strict=True)) if len(set(values)) > 1]
    if len(names) == prod(len({index[position] for index in indices}) for position in varying):
        return [names]
    parts: dict[str, list[str]] = {}
    for name, index in zip(names, indices, strict=True):
        parts.setdefault(index[varying[0]], []).append(name)
    return [group for part in parts.values() for group in _grids(part)]


def _merged(names: list[str]) -> str:
    """One name for a grid of layers: ``blocks.{0-11}.mlp``."""
    indices = zip(*(_INDEX.findall(name) for name in names), strict=True)
    ranges = iter([_ranges({int(value) for value in values}) for values in indices])
    return _INDEX.sub(lambda match: next(ranges), names[0])


def _ranges(numbers: set[int]) -> str:
    """``{0-2,5}`` for 0, 1, 2 and 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    described = ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    return described if len(numbers) == 1 else "{" + described + "}"


def _numel(entries: Iterable[ReportEntry]) -> int:
    return sum(entry.numel for entry in entries)


def _size(memory: int) -> str:
    size = float(memory)
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
