"""Which blocks of keys each block of queries attends to: the sparse form of attention.

A mask of whole blocks, 128 queries by 128 keys, is turned into lists of the key blocks to visit,
so that what is skipped costs nothing. A query whose keys are all skipped gets zeros, and minus
infinity as its log-sum-exp.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sagewan.errors import ShapeError

BLOCK = 128
_BLOCK = tl.constexpr(BLOCK)


@dataclass(frozen=True, kw_only=True)
class KeyBlocks:
    """For each block of queries, the whole blocks of keys to visit, and whether the last, partial
    one is visited too.

    Bm is B or 1, Hm is H or 1, Nb and Mb are the blocks that queries and keys fill, rounded up for
    queries and down for keys: indices [Bm, Hm, Nb, Mb] int32, of which the first ``counts``
    [Bm, Hm, Nb] int32 count; tails [Bm, Hm, Nb] int32, 0 or 1.
    """

    indices: Tensor
    counts: Tensor
    tails: Tensor

    def arguments(self) -> dict[str, object]:
        """What the kernels take, with the strides between the lists of batches and of heads."""
        batches, heads, rows = self.counts.shape
        return {
            "blocks": self.indices,
            "block_counts": self.counts,
            "block_tails": self.tails,
            "block_b": heads * rows if batches > 1 else 0,
            "block_h": rows if heads > 1 else 0,
        }


def key_blocks(mask: Tensor, *, batch: int, heads: int, queries: int, keys: int) -> KeyBlocks:
    """mask [B or 1, H or 1, ⌈N / 128⌉, ⌈M / 128⌉] bool, true where a block is attended to → its
    lists, on the same device. Raises ShapeError for a mask of another shape or dtype."""
    expected = (-(-queries // BLOCK), -(-keys // BLOCK))
    fits = mask.dim() == 4 and mask.shape[0] in (1, batch) and mask.shape[1] in (1, heads)
    if not fits or tuple(mask.shape[2:]) != expected or mask.dtype != torch.bool:
        raise ShapeError(
            f"the block mask is {list(mask.shape)} {str(mask.dtype).removeprefix('torch.')}: give "
            f"[{batch} or 1, {heads} or 1, {expected[0]}, {expected[1]}] bool"
        )
    whole = keys // BLOCK
    inner = mask[..., :whole]
    # Each block to its place in the list, those that are skipped to one beyond it: no sort.
    places = inner.cumsum(-1).sub_(1).masked_fill_(~inner, whole)
    blocks = torch.arange(whole, dtype=torch.int32, device=mask.device).expand_as(places)
    lists = blocks.new_zeros(*places.shape[:-1], whole + 1).scatter_(-1, places, blocks)
    tails = mask[..., whole] if keys % BLOCK else mask.new_zeros(mask.shape[:3])
    return KeyBlocks(
        indices=lists[..., :whole].contiguous(),
        counts=inner.sum(-1, dtype=torch.int32),
        tails=tails.to(torch.int32).contiguous(),
    )


NO_BLOCKS: dict[str, object] = {
    "blocks": None,
    "block_counts": None,
    "block_tails": None,
    "block_b": 0,
    "block_h": 0,
}


@triton.jit
def walk(
    block_counts, block_tails, block_b, block_h, heads, head, row_block, keys,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """→ where this block of queries has its list, how many keys its whole blocks have, and where
    the partial block begins and ends. Without a list, all keys, and blocks of a step."""
    place = 0
    whole = keys // BLOCK_N * BLOCK_N
    tail = whole
    end = keys
    if block_counts is not None:
        row = (head // heads) * block_b + (head % heads) * block_h + row_block
        place = row.to(tl.int64) * (keys // _BLOCK)
        whole = tl.load(block_counts + row) * _BLOCK
        tail = keys // _BLOCK * _BLOCK
        end = tl.where(tl.load(block_tails + row) != 0, keys, tail)
    return place, whole, tail, end


@triton.jit
def key_of(blocks, place, position, BLOCK_N: tl.constexpr, SIZE: tl.constexpr = BLOCK):
    """The key at a position among those of the blocks that are visited, one after the other."""
    if blocks is not None:
        position = tl.load(blocks + place + position // SIZE) * SIZE + position % SIZE
        # Else columns of V are read byte by byte: the compiler does not see this through the list.
        position = tl.multiple_of(position, BLOCK_N)
    return position


@triton.jit
def any_key_of(blocks, place, position, whole, tail, BLOCK_N: tl.constexpr):
    """As :func:`key_of`, with the partial block's keys after the ``whole`` blocks'."""
    start = tail + position - whole
    if position < whole:
        start = key_of(blocks, place, position, BLOCK_N)
    return start
