"""The commands, one file each: ``HELP``, ``EXAMPLES``, ``add_options(parser)`` and ``run(options, screen)``."""

__all__ = ["COMMANDS"]

from . import collapse, convert, demo, export, inspect, prune

COMMANDS = {
    "demo": demo,
    "convert": convert,
    "inspect": inspect,
    "prune": prune,
    "export": export,
    "collapse": collapse,
}
"""The commands in the order of the help. ``run`` returns what stands in the JSON object."""
