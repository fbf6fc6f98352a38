"""The report card that :func:`bnnify.evaluate` gives: a table, JSON, and pictures."""

__all__ = ["Report"]

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, check_path
from .bootstrap import Figure
from .report_plots import plot_report

_Rows = Mapping[str, Mapping[str, Figure]]

_CELL = 15


@dataclasses.dataclass(frozen=True)
class Report:
    """What :func:`bnnify.evaluate` found; ``str()`` gives a table of at most 80 columns.

    Rows are ``"posterior mean"``, the deterministic network, and ``"networks"``, the average over draws; both once more
    with ``", tempered"`` where there was validation data.

    Attributes:
        rows: Each metric of each row, with its bootstrap interval.
        differences: Of the other rows from the posterior mean, on the same resamples.
        out_of_distribution: AUROC and FPR95 of each score, by row and score; empty without foreign data.
        temperatures: The temperature of each tempered row.
        num_data: The number of data that count.
        num_foreign: The number of foreign data.
        num_samples: The number of networks.
        curves: What :meth:`plot` draws, as plain lists: by curve and then by row, or for histograms by score and side.
    """

    rows: _Rows
    differences: _Rows
    out_of_distribution: Mapping[str, _Rows]
    temperatures: Mapping[str, float]
    num_data: int
    num_foreign: int
    num_samples: int
    curves: Mapping[str, Any] = dataclasses.field(repr=False)

    def __str__(self) -> str:
        lines = [f"{self.num_data:,} data, {self.num_samples} networks"]
        metrics = next(iter(self.rows.values()))
        lines += _headings(list(self.rows))
        for metric in metrics:
            cells = [_cell(row[metric], self._differs(name, metric)) for name, row in self.rows.items()]
            lines.append(_line(metric, cells))
        if self.temperatures:
            found = [f"{self.temperatures[row]:.3g}" if row in self.temperatures else "" for row in self.rows]
            lines.append(_line("temperature", [text + " " * 9 if text else "" for text in found]))
        if self.out_of_distribution:
            lines += ["", f"against {self.num_foreign:,} foreign data", *_headings(list(self.out_of_distribution), 26)]
            scores = {score: None for row in self.out_of_distribution.values() for score in row}
            for metric in ("AUROC", "FPR95"):
                for score in scores:
                    found_at = (row.get(score) for row in self.out_of_distribution.values())
                    cells = ["" if found is None else _cell(found[metric]) for found in found_at]
                    lines.append(_line(f"{metric}, {score}", cells, 26))
        if any(figure.low is not None for figure in metrics.values()):
            lines += ["", "± half of the 95 % bootstrap interval; * the interval of the difference from the"]
            lines += ["  posterior mean, on the same resamples, leaves out 0"]
        return "\n".join(line.rstrip() for line in lines)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """All figures as a JSON object, without the curves; numbers that are not finite are null.

        Args:
            path: A file to write it to. Default: none.

        Raises:
            ArgumentError: The file cannot be written.
        """
        data = dataclasses.asdict(self)
        del data["curves"]
        text = json.dumps(_plain(data), indent=2, ensure_ascii=False)
        if path is not None:
            check_path("Report.to_json(path)", path)
            try:
                Path(path).write_text(text + "\n", encoding="utf-8")
            except OSError as error:
                raise ArgumentError(f"Cannot write `{path}`: {error.strerror}.") from error
        return text

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw reliability and risk–coverage, of a regression the coverage of intervals, and histograms of scores.

        Args:
            path: The file; its ending says the format, such as ``.png`` or ``.svg``.

        Raises:
            ArgumentError: The file cannot be written, or not in a format with this ending.
            MissingLibraryError: matplotlib is not installed.
        """
        check_path("Report.plot(path)", path)
        plot_report(self.curves, path)

    def _differs(self, row: str, metric: str) -> bool:
        found = self.differences.get(row, {}).get(metric)
        return found is not None and found.low is not None and found.high is not None and found.low * found.high > 0


def _headings(rows: list[str], width: int = 14) -> list[str]:
    """The names of rows, in a second line what follows a comma."""
    names = [row.partition(", ") for row in rows]
    lines = [_line("", [name + " " for name, _, _ in names], width), _line("", [end + " " for *_, end in names], width)]
    return [line for line in lines if line.strip()]


def _line(label: str, cells: list[str], width: int = 14) -> str:
    return label.ljust(width) + "".join(" " + cell.rjust(_CELL) for cell in cells)


def _cell(figure: Figure, differs: bool = False) -> str:
    """A figure with the half-width of its interval, both to the second digit of the latter."""
    if figure.low is None or figure.high is None:
        return f"{figure.value:.4g} "
    half = (figure.high - figure.low) / 2
    digits = min(max(1 - math.floor(math.log10(half)), 0), 5) if 0 < half < math.inf else 4
    return f"{figure.value:.{digits}f} ±{half:.{digits}f}" + ("*" if differs else " ")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
