"""What a token is told of its time: shifts, scales and gates for each *different* time.

Wan 2.2 TI2V gives every token a time of its own, of which there are two: 0 for a given first frame,
and the step's. diffusers (0.42) computes six vectors for every token, 1.9 GiB a block at
1280×704×121; here they are computed for the times there are, and handed out by chunks of tokens.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Times:
    """Which time each token has: ``values`` [B, T] the times, ``bounds`` of T runs of tokens, from
    bounds[i] to bounds[i + 1], the same for all B videos."""

    values: Tensor
    bounds: tuple[int, ...]

    @classmethod
    def of(cls, timestep: Tensor, tokens: int) -> "Times":
        """diffusers' ``timestep``: [B], one for all tokens of a video, or [B, tokens]."""
        if timestep.ndim == 1:
            return cls(timestep.unsqueeze(1), (0, tokens))
        _, counts = torch.unique_consecutive(timestep, dim=1, return_counts=True)
        bounds = (0, *counts.cumsum(0).tolist())
        return cls(timestep[:, list(bounds[:-1])], bounds)


@dataclass(frozen=True)
class Modulation:
    """Vectors for each time: ``vectors`` [B, T, M, W], M of them (shift, scale, gate, …)."""

    vectors: Tensor
    bounds: tuple[int, ...]

    def at(self, start: int, stop: int) -> tuple[Tensor, ...]:
        """The M vectors of the tokens from start to stop: each [B, 1, W] where they have one time,
        else [B, stop - start, W]."""
        runs = self.runs(start, stop)
        if len(runs) == 1:
            return runs[0][2].unsqueeze(1).unbind(2)
        of_runs = [x.unsqueeze(1).expand(-1, last - first, -1, -1) for first, last, x in runs]
        return torch.cat(of_runs, dim=1).unbind(2)

    def runs(self, start: int, stop: int) -> list[tuple[int, int, Tensor]]:
        """The tokens from start to stop by their times: (first, end) counted from start, and the
        vectors [B, M, W]."""
        found = []
        for index, (first, end) in enumerate(itertools.pairwise(self.bounds)):
            first, end = max(start, first), min(stop, end)
            if first < end:
                found.append((first - start, end - start, self.vectors[:, index]))
        return found
