"""Ways to look at a posterior, and to prune it."""

__all__ = [
    "Audit",
    "Figure",
    "ParameterSummary",
    "PruningReport",
    "Report",
    "audit",
    "evaluate",
    "plot_signal_to_noise",
    "prune",
    "signal_to_noise",
    "summarize",
]

from .audit import Audit, audit
from .bootstrap import Figure
from .evaluate import evaluate
from .evaluation_report import Report
from .plots import plot_signal_to_noise
from .pruning import PruningReport, prune, signal_to_noise
from .summary import ParameterSummary, summarize
