"""The seeded problems of the self-test, and the most error that each quality class may have.

Two families of inputs, both with K biased by channel as Wan's is. In ``bias`` every key counts, and
errors average out; ``local`` is like video, each query attending to its neighbours, so that few
keys carry the weight and errors show.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from sagewan.plan.catalogue import Implementation, Problem
from sagewan.plan.modes import Quality
from sagewan.reference.attention import BLOCK

Inputs = tuple[Tensor, Tensor, Tensor]
_NEIGHBOURS = 64

# Twice the worst that the formats of a class cost on these very problems, emulated (bias, local):
# 16 bit .0018, .0017; INT8, smoothed and rotated, with 16-bit P·V .0076, .0056; INT8 with FP8 P·V
# .017, .028; NVFP4 .11, .15. Short sequences cost most: few keys to average over. Noise is above 1.
# That is at head size 128, Wan's; fewer channels cost more, 8 of them up to .93 of a limit.
LIMITS: Mapping[str, Mapping[Quality, float]] = MappingProxyType(
    {
        "bias": {
            Quality.EXACT: 0.01,
            Quality.EXCELLENT: 0.015,
            Quality.VERY_GOOD: 0.035,
            Quality.GOOD: 0.2,
        },
        "local": {
            Quality.EXACT: 0.01,
            Quality.EXCELLENT: 0.015,
            Quality.VERY_GOOD: 0.06,
            Quality.GOOD: 0.3,
        },
    }
)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """``queries`` and ``keys`` count tokens; ``key_heads`` divides ``heads``; ``masked`` leaves out
    half of the blocks, others in each head."""

    family: str
    queries: int
    keys: int
    batch: int = 1
    heads: int = 2
    key_heads: int = 2
    masked: bool = False

    def block_mask(self, device: str) -> Tensor | None:
        """[1, H, ⌈N/128⌉, ⌈M/128⌉] bool, true for the blocks to attend to; None for all."""
        if not self.masked:
            return None
        heads, rows, columns = torch.meshgrid(
            *(torch.arange(n) for n in (self.heads, *self._blocks)), indexing="ij"
        )
        return ((heads + rows + columns) % 2 == 0).unsqueeze(0).to(device)

    @property
    def _blocks(self) -> tuple[int, int]:
        return -(-self.queries // BLOCK), -(-self.keys // BLOCK)

    def inputs(self, problem: Problem, device: str) -> Inputs:
        """q [B, H, N, D], k and v [B, Hk, M, D] in the head size and dtype of the problem: the
        same values on every machine."""
        dtype: torch.dtype = getattr(torch, problem.dtype)
        generator = torch.Generator().manual_seed(self.queries * 1_000_003 + self.keys)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device)

        make = _FAMILIES[self.family]
        q, k, v = make(self, problem.head_dim, normal)
        return q.to(dtype), k.to(dtype), v.to(dtype)


# Odd lengths, unequal lengths, and a length beyond which one FP8 kernel is known to fail.
TRIALS = (
    Trial(family="bias", queries=333, keys=333, batch=2),
    Trial(family="bias", queries=97, keys=457),
    Trial(family="local", queries=1000, keys=1000),
    Trial(family="bias", queries=64, keys=200_000, heads=1, key_heads=1),
)
GROUPED = Trial(family="bias", queries=130, keys=97, heads=4, key_heads=2)
MASKED = Trial(family="bias", queries=333, keys=1000, masked=True)

# Large enough to fill a GPU, a few milliseconds on a fast one; and what a CPU does as quickly.
TIMED_ON_GPU = Trial(family="bias", queries=16_384, keys=16_384, heads=12, key_heads=12)
TIMED_ON_CPU = Trial(family="bias", queries=512, keys=512)


def trials_for(row: Implementation) -> Iterator[Trial]:
    """The trials that a row claims to take."""
    grouped = (GROUPED,) if row.grouped_heads else ()
    masked = (MASKED,) if row.block_mask else ()
    for trial in (*TRIALS, *grouped, *masked):
        keys = -(-trial.keys // row.key_block) * row.key_block
        queries = keys if trial.queries == trial.keys else trial.queries
        yield replace(trial, queries=queries, keys=keys)


def _bias(trial: Trial, head_dim: int, normal: Callable[..., Tensor]) -> Inputs:
    keys = (trial.batch, trial.key_heads, trial.keys, head_dim)
    channels = (1, trial.key_heads, 1, head_dim)
    q = 1.5 * normal(trial.batch, trial.heads, trial.queries, head_dim)
    k = normal(*keys) + 3 * normal(*channels)
    v = normal(*keys) + 0.5 * normal(*channels)
    return q, k, v


def _local(trial: Trial, head_dim: int, normal: Callable[..., Tensor]) -> Inputs:
    shape = (trial.batch, trial.heads, trial.keys, head_dim)
    places = normal(*shape[:2], -(-trial.keys // _NEIGHBOURS), head_dim)
    base = places.repeat_interleave(_NEIGHBOURS, 2)[:, :, : trial.keys] + 0.5 * normal(*shape)
    q = 1.5 * base + 0.5 * normal(*shape)
    k = base + 3 * normal(1, trial.heads, 1, head_dim)
    return q, k, normal(*shape)


_FAMILIES: Mapping[str, Callable[..., Inputs]] = MappingProxyType({"bias": _bias, "local": _local})
