"""Tokens in an order in which neighbours in the sequence are neighbours in the video, and which
blocks of that order attend to which.

A pen fills each frame in strips, up and down within a strip, forth along one strip and back along
the next; the next frame is filled the way back. So 128 tokens that follow each other are a compact
patch, for any size of the frame, and frames stay whole runs of tokens.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from sagewan.plan.sparsity import BLOCK, SparsityPlan

# A strip so high that a block of it is about as wide.
_STRIP = round(BLOCK**0.5)
# How many tokens apart a frame counts for a window.
_FRAME = 2.0


@dataclass(frozen=True)
class Tiles:
    """``order`` [N] int64: token i of the new order is token order[i] of the old; ``back`` [N] is
    its inverse. ``mask`` [1, 1, ⌈N/128⌉, ⌈N/128⌉] bool is true for the blocks to attend to."""

    order: Tensor
    back: Tensor
    mask: Tensor

    @classmethod
    def of(cls, plan: SparsityPlan, device: str) -> "Tiles":
        """Made on the CPU, so that every device has the same."""
        order = token_order(plan.grid)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        mask = nearest_blocks(plan, order)
        return cls(*(x.to(device) for x in (order, back, mask)))

    def arranged(self, x: Tensor) -> Tensor:
        """[B, N, …] in the new order."""
        return x.index_select(1, self.order)

    def restored(self, x: Tensor) -> Tensor:
        """[B, N, …] in the old order."""
        return x.index_select(1, self.back)


def token_order(grid: tuple[int, int, int]) -> Tensor:
    """[N] int64 for a grid of (frames, rows, columns)."""
    frames, rows, columns = grid
    strips = max(1, round(rows / _STRIP))
    bounds = [rows * i // strips for i in range(strips + 1)]
    cells = torch.arange(rows * columns).reshape(rows, columns)
    pieces = []
    for number, (top, bottom) in enumerate(itertools.pairwise(bounds)):
        strip = cells[top:bottom].T.clone()  # a row for each column of the frame
        if number % 2:
            strip = strip.flip(0)
        strip[1::2] = strip[1::2].flip(1)
        pieces.append(strip.flatten())
    frame = torch.cat(pieces)
    ways = [frame.flip(0) if number % 2 else frame for number in range(frames)]
    return torch.cat([way + number * rows * columns for number, way in enumerate(ways)])


def nearest_blocks(plan: SparsityPlan, order: Tensor) -> Tensor:
    """[1, 1, ⌈N/128⌉, ⌈N/128⌉] bool with ``plan.kept`` true in each row."""
    centres, first = _centres(plan.grid, order)
    apart = (centres[:, None] - centres[None]).abs()
    time, across = apart[..., 0], apart[..., 1:]
    if plan.sparsity.kind == "radial":
        # A disc around the same place, of an area that falls with the distance in time. A block is
        # itself an area: without it the same place would be near however far the frame is.
        distance = (BLOCK + across.square().sum(-1)) * time.clamp(min=1)
        # Of a short video it would be all that is kept, and nothing that is near.
        if 2 * int(first.sum()) <= plan.kept:
            distance[:, first] = -1
    else:
        distance = (apart * torch.tensor([_FRAME, 1.0, 1.0], dtype=torch.float64)).amax(-1)
    distance.fill_diagonal_(-2)
    kept = distance.argsort(dim=1, stable=True)[:, : plan.kept]
    mask = torch.zeros(plan.blocks, plan.blocks, dtype=torch.bool)
    return mask.scatter_(1, kept, value=True)[None, None]


def _centres(grid: tuple[int, int, int], order: Tensor) -> tuple[Tensor, Tensor]:
    """Of each block the mean place (frame, row, column), float64 [blocks, 3], and whether it holds
    tokens of the first frame."""
    _, rows, columns = grid
    places = torch.stack(
        [order // (rows * columns), order // columns % rows, order % columns], dim=1
    ).double()
    blocks = places.split(BLOCK)
    first = torch.tensor([bool((block[:, 0] == 0).any()) for block in blocks])
    return torch.stack([block.mean(0) for block in blocks]), first
