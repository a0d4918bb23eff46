"""Sparse attention: blocks of keys that a block of queries does not look at. Training-free, off by
default.

Tokens are put in an order in which 128 that follow each other are near each other, and each such
block of queries keeps as many blocks of keys as every other: those that are nearest, in the sense
of the kind. ``radial`` after Radial Attention (arXiv:2506.19852): what is kept of a frame halves
with each doubling of its distance in time; the first frame is kept whole, where that is no more
than half of what is kept. ``sta`` after Sliding Tile Attention (arXiv:2502.04507): a window, half
as many frames long as it is tokens wide, moved inwards at the video's borders.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

from sagewan.errors import RequestError

KINDS = ("radial", "sta")
# Tokens of a block, of queries and of keys alike, as the kernels have it.
BLOCK = 128
# Radial Attention's authors keep the first 12 of 50 steps, and the first layer, dense.
_DENSE_SHARE = 0.25
DENSE_LAYERS = 1


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """Which blocks of keys are left out, written ``KIND:SHARE`` or ``KIND:SHARE,STEPS``; ``share``
    of them are, ``dense`` first steps leave none out (None: a quarter of the steps)."""

    kind: str
    share: float
    dense: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Sparsity":
        kind, _, numbers = text.partition(":")
        number, comma, steps = numbers.partition(",")
        try:
            share = float(number)
        except ValueError:
            share = -1.0
        if kind not in KINDS or not 0 < share < 1 or (comma and not steps.isdecimal()):
            raise RequestError(
                f"sparsity={text}: write KIND:SHARE with a share between 0 and 1, such as "
                f"radial:0.75, or radial:0.75,4 to keep the first 4 steps dense (kinds: "
                f"{', '.join(KINDS)})"
            )
        return cls(kind=kind, share=share, dense=int(steps) if comma else None)

    def __str__(self) -> str:
        steps = "" if self.dense is None else f",{self.dense}"
        return f"{self.kind}:{self.share:.10g}{steps}"


@dataclass(frozen=True, kw_only=True)
class SparsityPlan:
    """The sparse attention of a run over ``grid`` (frames, rows, columns) of tokens: each of the
    ``blocks`` of queries attends to ``kept`` of as many blocks of keys, but in the ``dense_steps``
    first steps and the ``dense_layers`` first layers, which attend to all."""

    sparsity: Sparsity
    grid: tuple[int, int, int]
    blocks: int
    kept: int
    dense_steps: int
    dense_layers: int

    @property
    def leaves_out(self) -> bool:
        """Whether there is anything that a layer leaves out: a short video has too few blocks."""
        return self.kept < self.blocks

    @property
    def skipped(self) -> float:
        """The share of the blocks of keys that a sparse layer leaves out."""
        return 1 - self.kept / self.blocks

    def sparse_at(self, step: int) -> bool:
        """Whether anything is left out at this step (from 0)."""
        return self.leaves_out and step >= self.dense_steps

    def skipped_of_all(self, steps: Iterable[int], layers: int) -> float:
        """The share of the blocks of keys that is left out in all layers of all these steps."""
        counted = list(steps)
        sparse = sum(map(self.sparse_at, counted)) * max(0, layers - self.dense_layers)
        return self.skipped * sparse / (len(counted) * layers)


def plan_sparsity(
    sparsity: Sparsity | None, grid: tuple[int, int, int], steps: int
) -> SparsityPlan | None:
    """Raises RequestError where all steps would be dense."""
    if sparsity is None:
        return None
    frames, rows, columns = grid
    blocks = ceil(frames * rows * columns / BLOCK)
    dense = ceil(_DENSE_SHARE * steps) if sparsity.dense is None else sparsity.dense
    if dense >= steps:
        raise RequestError(
            f"sparsity={sparsity}: every step, {steps} in all, would be dense; keep fewer so, "
            f"such as {sparsity.kind}:{sparsity.share:g},0"
        )
    return SparsityPlan(
        sparsity=sparsity,
        grid=grid,
        blocks=blocks,
        kept=max(1, round((1 - sparsity.share) * blocks)),
        dense_steps=dense,
        dense_layers=DENSE_LAYERS,
    )
