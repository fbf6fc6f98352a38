"""What the benchmarks share: runs and tables, timing, training, evaluation, data, networks and other libraries."""
