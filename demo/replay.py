"""A training step of fixed shapes as one CUDA graph: no launch is waited for, no shape guessed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

WARM_UP = 3
_GRAPHS: list[torch.cuda.CUDAGraph] = []  # all ever made: the pool they share ends with the last


@cache
def _pool() -> tuple[int, int]:
    """The memory of all graphs: none of them needs what another one left there."""
    return torch.cuda.graph_pool_handle()


@cache
def _stream() -> torch.cuda.Stream:
    """Warm-ups and captures share one, or autograd would wait for one outside the graph."""
    return torch.cuda.Stream()


class Replay:
    """Calls `step` plainly on a CPU; on a GPU captures it after `WARM_UP` plain calls.

    `step` must work on tensors that stay where they are, and leave no gradient behind.
    """

    def __init__(self, step: Callable[[], None], device: torch.device) -> None:
        self.step = step
        self.graph: torch.cuda.CUDAGraph | None = None
        if device.type != "cuda":
            return
        stream = _stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                step()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=_pool(), stream=stream):
            step()
        torch.cuda.synchronize()
        _GRAPHS.append(self.graph)

    def __call__(self) -> None:
        if self.graph is None:
            self.step()
        else:
            self.graph.replay()
