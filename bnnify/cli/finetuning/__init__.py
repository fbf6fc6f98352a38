"""Fine-tuning by the ELBO: the loop over epochs, its checkpoint and logs, and the processes that share it."""

__all__ = ["FineTuning", "Logs", "Plan", "Ranks", "process_group", "read_checkpoint", "write_checkpoint"]

from .checkpoint import read_checkpoint, write_checkpoint
from .logs import Logs
from .loop import FineTuning, Plan
from .ranks import Ranks, process_group
