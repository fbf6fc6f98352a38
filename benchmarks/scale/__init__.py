"""Models that are larger than one process should hold."""
