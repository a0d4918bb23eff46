"""What preparation knows of a whole sequence: its mean, and the largest value of each channel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sagewan.kernels.launch import VARYING, Repeated, Schedule, block_of, strided

_CHUNKS = 32
_ROWS = 64
# Any vector may be subtracted, and a thousand tokens from all over a video give their mean nearly.
SAMPLED_FROM, _SAMPLED = 8192, 1024
# Primes, which divide the width of hardly any video, so that the sample has all columns.
_STRIDES = (7, 31, 73, 127, 241)
# Reading is all that a reduction does: it asks ahead.
_REDUCTION = Schedule(warps=8, stages=3)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


def mean(x: Tensor) -> Tensor:
    """[B, H, N, D] → its mean over N, [B, H, D'] float32, padded by zeros; of a long sequence, the
    mean of its sample."""
    x = _sampled(x)
    return _reduce(x, float(x.shape[2]), largest=False).sum(2)


def sum_and_count(x: Tensor) -> tuple[Tensor, int]:
    """[B, H, N, D] → its sum over N, [B, H, D'] float32, padded by zeros, and N; of
    ``SAMPLED_FROM`` tokens and more, of a sample of them.

    Where several devices hold parts of K, the sums and the counts of all, added up, give the mean
    that each must subtract; it is passed on as ``k_mean``.
    """
    x = _sampled(x)
    return _reduce(x, 1.0, largest=False).sum(2), x.shape[2]


def _sampled(x: Tensor) -> Tensor:
    return x[:, :, :: stride_of(x.shape[2])]


def stride_of(tokens: int) -> int:
    """From one token of the sample to the next, so that there are a thousand at least and,
    of up to 250,000, less than five thousand."""
    if tokens < SAMPLED_FROM:
        return 1
    return max(stride for stride in _STRIDES if stride <= max(7, tokens // _SAMPLED))


def largest(x: Tensor, over: float = 1.0) -> Tensor:
    """[B, H, N, D] → the largest magnitude of each channel divided by ``over``, [B, H, D'] float32;
    instead of zero the smallest normal number, so that one may divide by it."""
    return _reduce(x, over, largest=True).amax(2)


def _reduce(x: Tensor, over: float, *, largest: bool) -> Tensor:
    """Of parts of N, the sums or the largest magnitudes, divided by ``over``, [B, H, parts, D']
    float32."""
    batch, heads, count, size = x.shape
    block = block_of(size)
    chunks = min(_CHUNKS, triton.cdiv(count, _ROWS))
    partial = torch.empty(batch, heads, chunks, block, dtype=torch.float32, device=x.device)
    arguments = {
        **strided("x", x),
        "partial": partial,
        "heads": heads,
        "count": count,
        "size": size,
        "chunk": triton.cdiv(triton.cdiv(count, chunks), _ROWS) * _ROWS,
        "over": over,
        "LARGEST": largest,
        "BLOCK_R": _ROWS,
        "BLOCK_D": block,
    }
    _launch_reduce(None, (chunks, batch * heads, 1), x.device, arguments)
    return partial


@triton.jit
def load_rows(
    x, x_b, x_h, x_n, x_d, heads, head, rows, count, size, BLOCK_D: tl.constexpr
):  # rows [R] of one head → [R, D'], zero beyond the tensor
    base = (head // heads).to(tl.int64) * x_b + (head % heads).to(tl.int64) * x_h
    channels = tl.arange(0, BLOCK_D)
    offsets = rows.to(tl.int64)[:, None] * x_n + channels[None, :] * x_d
    mask = (rows < count)[:, None] & (channels < size)[None, :]
    return tl.load(x + base + offsets, mask=mask, other=0.0)


@triton.jit(do_not_specialize=VARYING)
def _reduce_kernel(
    x, x_b, x_h, x_n, x_d,  # [B, H, N, D]
    partial,  # [B·H, chunks, D'] float32
    heads, count, size, chunk, over,
    LARGEST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    start = tl.program_id(0) * chunk
    for row in range(start, tl.minimum(start + chunk, count), BLOCK_R):
        rows = row + tl.arange(0, BLOCK_R)
        tile = load_rows(x, x_b, x_h, x_n, x_d, heads, head, rows, count, size, BLOCK_D)
        tile = tile.to(tl.float32)
        total = tl.maximum(total, tl.abs(tile)) if LARGEST else total + tile
    result = (tl.max(total, 0) if LARGEST else tl.sum(total, 0)) / over
    if LARGEST:
        result = tl.maximum(result, _TINY)
    place = (head * tl.num_programs(0) + tl.program_id(0)) * BLOCK_D
    tl.store(partial + place + tl.arange(0, BLOCK_D), result)


_launch_reduce = Repeated(_reduce_kernel, _REDUCTION)
