"""What the figures of the documentation are printed by: run from the root of the repository, as modules.

``python -m benchmarks.speed.train_step``, say. ``speed`` measures time and memory, ``quality`` predictions, and
``sweep`` converts the models of three libraries; ``harness`` has what they share.
"""
