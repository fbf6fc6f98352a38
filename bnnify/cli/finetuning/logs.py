"""What is written down of each epoch: a CSV file and, where it is installed, TensorBoard's events."""

__all__ = ["Logs"]

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...checkpoints.atomic import replace_atomically


class Logs:
    """The logs in a folder, which is made.

    Args:
        folder: For ``metrics.csv`` and TensorBoard's files.
        rows: The epochs before, of a training that goes on.
    """

    def __init__(self, folder: Path, rows: Sequence[Mapping[str, Any]] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self.rows = folder / "metrics.csv", [dict(row) for row in rows]
        self._events: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._events = SummaryWriter(str(folder), purge_step=len(self.rows) or None)

    def add(self, row: Mapping[str, Any]) -> None:
        """Write the figures of one epoch."""
        self.rows.append(dict(row))
        text = io.StringIO()
        table = csv.DictWriter(text, list(self.rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(self.rows)
        with replace_atomically(self._path) as file:
            file.write(text.getvalue().encode())
        if self._events is not None:
            for name, value in row.items():
                if name != "epoch" and value is not None:
                    self._events.add_scalar(name, value, row["epoch"])
            self._events.flush()

    def close(self) -> None:
        """Close the files."""
        if self._events is not None:
            self._events.close()
