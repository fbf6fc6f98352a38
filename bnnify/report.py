"""What a conversion did with every parameter of a model, and why."""

__all__ = ["ConversionReport", "ReportEntry"]

from dataclasses import dataclass, field

NOT_SELECTED = "not selected"
FROZEN = "frozen (requires_grad=False); name the parameter itself in `select` to convert it"
BY_TYPE = "not converted by default"
EMPTY = "it has no elements"
UNSUPPORTED = "unsupported: "


@dataclass(frozen=True)
class ReportEntry:
    """One parameter of the model: Bayesian, or left alone for a reason.

    Attributes:
        name: The qualified name, such as ``layer1.0.conv1.weight``.
        module: The class of the module that holds it.
        shape: Its shape.
        bayesian: Whether it is Bayesian now.
        reason: Why it was left alone; empty for a Bayesian parameter.
        settings: Estimator, prior and initial σ of a Bayesian parameter; empty otherwise.
    """

    name: str
    module: str
    shape: tuple[int, ...]
    bayesian: bool
    reason: str = ""
    settings: str = ""

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def unsupported(self) -> bool:
        """Whether it was left alone for want of support, rather than by choice."""
        return self.reason.startswith(UNSUPPORTED)


@dataclass(frozen=True)
class ConversionReport:
    """Every parameter of the model, in order; printing it gives a table.

    Attributes:
        entries: One entry for each parameter; a tied one appears once.
    """

    entries: tuple[ReportEntry, ...] = field(default_factory=tuple)

    @property
    def bayesian(self) -> tuple[ReportEntry, ...]:
        """The parameters that are Bayesian."""
        return tuple(entry for entry in self.entries if entry.bayesian)

    @property
    def left_alone(self) -> tuple[ReportEntry, ...]:
        """The parameters that are not, each with its reason."""
        return tuple(entry for entry in self.entries if not entry.bayesian)

    def __str__(self) -> str:
        total = sum(entry.numel for entry in self.entries)
        count = sum(entry.numel for entry in self.bayesian)
        rows = [("parameter", "module", "shape", "Bayesian")]
        rows += [(e.name, e.module, str(list(e.shape)), e.settings or f"no: {e.reason}") for e in self.entries]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
        ]
        share = f"{count:,} of {total:,} weights ({count / max(total, 1):.1%})"
        lines.append(f"{len(self.bayesian)} of {len(self.entries)} parameters Bayesian, {share}")
        return "\n".join(lines)
