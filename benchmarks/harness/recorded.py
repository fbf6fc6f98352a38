"""A training step that a GPU repeats by itself: one of a small network otherwise waits for Python and for launches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARMUP = 3
"""Calls before the recording, in which optimizers make their state and libraries choose how they compute."""


class Recorded:
    """Runs a step as it is for the first calls, and then the CUDA graph that was recorded of it.

    What changes from call to call has to be a tensor on the device: an argument, whose shape stays, or one that is
    filled in place. Random numbers go on as they would have done without the graph.
    """

    def __init__(self, step: Callable[..., None]) -> None:
        self.step, self.calls = step, 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: tuple[Tensor, ...] = ()

    def __call__(self, *inputs: Tensor) -> None:
        if self.graph is None and self.calls < WARMUP:
            self.calls += 1
            self._beside(inputs)
            return
        if self.graph is None:
            self.inputs = tuple(tensor.clone() for tensor in inputs)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.step(*self.inputs)
        for kept, tensor in zip(self.inputs, inputs, strict=True):
            kept.copy_(tensor)
        self.graph.replay()

    def _beside(self, inputs: tuple[Tensor, ...]) -> None:
        """On a stream of its own, as torch asks for the calls before a recording."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
