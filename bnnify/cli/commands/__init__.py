"""The commands, one file each: ``HELP``, ``EXAMPLES``, ``add_options(parser)`` and ``run(options, screen)``."""

__all__ = ["COMMANDS"]

from . import collapse, completion, convert, demo, evaluate, export, finetune, inspect, predict, prune, tune

COMMANDS = {
    "demo": demo,
    "convert": convert,
    "inspect": inspect,
    "tune": tune,
    "evaluate": evaluate,
    "predict": predict,
    "finetune": finetune,
    "prune": prune,
    "export": export,
    "collapse": collapse,
    "completion": completion,
}
"""The commands in the order of the help. ``run`` returns what stands in the JSON object."""
