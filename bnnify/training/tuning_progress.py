"""The progress bar of tune_std."""

__all__ = ["TuningProgress"]

import math
from types import TracebackType
from typing import Any

from ..progress import progress_bar


class TuningProgress:
    """A bar over the forwards of the factor that is tried, and above it a line for each that was tried before.

    Args:
        wanted: Show it at all, which needs rich.

    Raises:
        MissingLibraryError: It is wanted, and rich is not installed.
    """

    def __init__(self, wanted: bool) -> None:
        self._bar: Any = None
        if wanted:
            self._bar = progress_bar("tune_std(progress=True)")
            self._task = self._bar.add_task("tune_std")

    def __enter__(self) -> "TuningProgress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, what: str, log_factor: float, forwards: int) -> None:
        """Begin with a factor on ``what``, for which the model is called ``forwards`` times."""
        if self._bar is not None:
            description = f"{what} × {math.exp(log_factor):.3g}"
            self._bar.reset(self._task, total=forwards, description=description)

    def advance(self) -> None:
        """Count a forward."""
        if self._bar is not None:
            self._bar.advance(self._task)

    def end(self, what: str, log_factor: float, loss: float) -> None:
        """Print the factor with its loss."""
        if self._bar is not None:
            self._bar.console.print(f"{what} × {math.exp(log_factor):.3g}: {loss:.4f} nats per datum", highlight=False)
