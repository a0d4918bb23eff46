"""Q, K and V made ready for FP4 attention: smoothed and quantised to NVFP4, each in one kernel.

Of each 128 rows of Q the mean is taken away, and what it would have added to the scores is computed
apart, from K as it came (:func:`corrections`). K loses its mean over the sequence, V is quantised
along the keys, which P·V sums over. After SageAttention3 (arXiv:2505.11594).
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from sagewan.kernels.fp4 import nvfp4, power_of_two_scale
from sagewan.kernels.launch import VARYING, Schedule, block_of, compute_capability, launch, strided
from sagewan.kernels.prepared import PADDING, Fp4Columns, Fp4Rows, Smoothing
from sagewan.kernels.sequence import largest, load_rows

# The hardware multiplies at least 64 values of FP4 at a time.
MIN_BLOCK_D = 64
_GROUP_MAX = 448.0 * 6.0
_ROWS = 32
_KEYS = 64
_MEANS = 32


def is_native(sm: int) -> bool:
    """Whether a compute capability has tensor cores for FP4 (all Blackwell has)."""
    return sm >= 100


def block_d_of(head_dim: int) -> int:
    """The head size inside the kernels of FP4."""
    return max(MIN_BLOCK_D, block_of(head_dim))


def fp4_queries(
    q: Tensor, factor: float, *, other: Tensor | None = None, dot_factor: float = 1.0
) -> tuple[Fp4Rows, Tensor]:
    """q [B, H, N, D], 16 bit → its rows times ``factor``, minus the mean of each 128, and those
    means [B, H, N'/128, D'] float32. ``other`` [B, Hk, D'] asks for the dots of the rows as they
    came with it, times ``dot_factor``."""
    batch, heads, count, size = q.shape
    blocks = triton.cdiv(count, PADDING)
    means = q.new_empty(batch, heads, blocks, block_d_of(size), dtype=torch.float32)
    dots = None
    if other is not None:
        dots = q.new_empty(batch, heads, blocks * PADDING, dtype=torch.float32)
    extra = {
        "means": means,
        "minus": None,
        "other": other,
        "dots": dots,
        "factor": factor,
        "dot_factor": dot_factor,
        "SHARED": heads // other.shape[1] if other is not None else 1,
    }
    return _rows(q, extra), means


def fp4_keys(k: Tensor, k_mean: Tensor) -> Fp4Rows:
    """k [B, Hk, M, D], 16 bit → its rows minus ``k_mean`` [B, Hk, D'] float32."""
    extra = {
        "means": None,
        "minus": k_mean,
        "other": None,
        "dots": None,
        "factor": 1.0,
        "dot_factor": 1.0,
        "SHARED": 1,
    }
    return _rows(k, extra)


def _rows(x: Tensor, extra: Mapping[str, object]) -> Fp4Rows:
    batch, heads, count, size = x.shape
    block, blocks = block_d_of(size), triton.cdiv(count, PADDING)
    dots = extra["dots"]
    rows = Fp4Rows(
        data=x.new_empty(batch, heads, blocks * PADDING, block // 2, dtype=torch.uint8),
        scales=x.new_empty(batch, heads, blocks * PADDING, block // 16, dtype=torch.uint8),
        scale=x.new_empty(batch, heads, blocks, dtype=torch.float32),
        dots=dots if isinstance(dots, Tensor) else None,
    )
    arguments = {
        **strided("x", x),
        **extra,
        "data": rows.data,
        "scales": rows.scales,
        "scale": rows.scale,
        "heads": heads,
        "count": count,
        "size": size,
        "NATIVE": is_native(compute_capability(x.device)),
        "MEAN_D": block_of(size),
        "BLOCK_R": PADDING,
        "PART_R": _ROWS,
        "BLOCK_D": block,
    }
    launch(_rows_kernel, (blocks, batch * heads), x.device, arguments, Schedule(warps=8))
    return rows


def fp4_columns(v: Tensor) -> Fp4Columns:
    """V [B, Hk, M, D], 16 bit → NVFP4, transposed, its groups running along the keys."""
    batch, heads, count, size = v.shape
    block, padded = block_d_of(size), triton.cdiv(count, PADDING) * PADDING
    # A power of two from each channel's largest magnitude, as power_of_two_scale's.
    wanted = (largest(v) / _GROUP_MAX).clamp_(min=2.0**-120)
    scale = wanted.view(torch.int32).add_(0x7FFFFF).bitwise_and_(0x7F800000).view(torch.float32)
    if scale.shape[-1] < block:
        scale = torch.nn.functional.pad(scale, (0, block - scale.shape[-1]), value=1.0)
    columns = Fp4Columns(
        data=v.new_empty(batch, heads, block, padded // 2, dtype=torch.uint8),
        scales=v.new_empty(
            batch, heads, padded // PADDING, block, PADDING // 16, dtype=torch.uint8
        ),
        scale=scale,
    )
    arguments = {
        **strided("v", v),
        "data": columns.data,
        "scales": columns.scales,
        "scale": columns.scale,
        "heads": heads,
        "count": count,
        "padded": padded,
        "size": size,
        "NATIVE": is_native(compute_capability(v.device)),
        "TOGETHER": PADDING,
        "BLOCK_R": _KEYS,
        "BLOCK_D": block,
    }
    grid = (padded // _KEYS, batch * heads)
    launch(_columns_kernel, grid, v.device, arguments, Schedule(warps=8))
    return columns


def corrections(smoothing: Smoothing, first: int, count: int) -> Tensor:
    """What the means of ``count`` blocks of queries from ``first`` give with the smoothed keys:
    [B, H, count, M'] float32, in powers of two."""
    means, k, k_mean = smoothing.means, smoothing.k, smoothing.k_mean
    batch, heads, blocks, block_d = means.shape
    padded = triton.cdiv(k.shape[2], PADDING) * PADDING
    out = k.new_empty(batch, heads, count, padded, dtype=torch.float32)
    arguments = {
        "means": means,
        **strided("k", k),
        "k_mean": k_mean,
        "out": out,
        "heads": k.shape[1],
        "first": first,
        "blocks": blocks,
        "count": count,
        "keys": k.shape[2],
        "padded": padded,
        "size": k.shape[3],
        "SHARED": heads // k.shape[1],
        "MEAN_D": k_mean.shape[2],
        "BLOCK_Q": _MEANS,
        "BLOCK_N": _KEYS,
        "BLOCK_D": block_d,
    }
    grid = (padded // _KEYS, triton.cdiv(count, _MEANS), batch * heads)
    launch(_corrections_kernel, grid, k.device, arguments, Schedule(warps=4))
    return out


@triton.jit(do_not_specialize=VARYING)
def _rows_kernel(
    x, x_b, x_h, x_n, x_d,  # [B, H, N, D]
    means,  # [B·H, N'/128, D'] float32, or None: Q's, whose means are taken from it
    minus,  # [B·H, MEAN_D] float32, or None: K's
    other,  # [B·Hk, MEAN_D] float32, or None
    dots,  # [B·H, N'] float32, or None
    data,  # [B·H, N', D'/2] uint8
    scales,  # [B·H, N', D'/16] uint8
    scale,  # [B·H, N'/128] float32
    heads, count, size, factor, dot_factor,
    SHARED: tl.constexpr, NATIVE: tl.constexpr, MEAN_D: tl.constexpr, BLOCK_R: tl.constexpr,
    PART_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A block of rows is read three times, in parts: for its mean, its largest, and its values. But
    for the first, it comes out of the cache."""
    block, head = tl.program_id(0), tl.program_id(1)
    place = head.to(tl.int64) * tl.num_programs(0) + block
    channels = tl.arange(0, BLOCK_D)
    start = block * BLOCK_R
    end = tl.minimum(start + BLOCK_R, count)
    if minus is not None:
        vector = tl.load(minus + head * MEAN_D + channels, channels < MEAN_D, 0.0)
    else:
        total = tl.zeros((BLOCK_D,), tl.float32)
        for first in range(start, end, PART_R):
            rows = first + tl.arange(0, PART_R)
            part = load_rows(x, x_b, x_h, x_n, x_d, heads, head, rows, count, size, BLOCK_D)
            total += tl.sum(part.to(tl.float32) * factor, 0)
        vector = total / (end - start).to(tl.float32)
        tl.store(means + place * BLOCK_D + channels, vector)
    top = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(start, end, PART_R):
        rows = first + tl.arange(0, PART_R)
        part = load_rows(x, x_b, x_h, x_n, x_d, heads, head, rows, count, size, BLOCK_D)
        values = part.to(tl.float32) * factor - vector[None, :]
        values = tl.where((rows < count)[:, None], values, 0.0)
        top = tl.maximum(top, tl.max(tl.abs(values), 0))
    whole = power_of_two_scale(tl.max(top, 0))
    tl.store(scale + place, whole)
    for first in range(start, start + BLOCK_R, PART_R):
        rows = first + tl.arange(0, PART_R)
        part = load_rows(x, x_b, x_h, x_n, x_d, heads, head, rows, count, size, BLOCK_D)
        part = part.to(tl.float32)
        at = place * BLOCK_R + (first - start) + tl.arange(0, PART_R)
        if other is not None:
            seen = tl.load(other + head // SHARED * MEAN_D + channels, channels < MEAN_D, 0.0)
            tl.store(dots + at, tl.sum(part * seen[None, :], 1) * dot_factor)
        values = tl.where((rows < count)[:, None], part * factor - vector[None, :], 0.0)
        packed, codes = nvfp4(values * (1.0 / whole), NATIVE, True, PART_R, BLOCK_D)
        pairs, groups = tl.arange(0, BLOCK_D // 2), tl.arange(0, BLOCK_D // 16)
        tl.store(data + at[:, None] * (BLOCK_D // 2) + pairs[None, :], packed)
        tl.store(scales + at[:, None] * (BLOCK_D // 16) + groups[None, :], codes)


@triton.jit(do_not_specialize=VARYING)
def _columns_kernel(
    v, v_b, v_h, v_n, v_d,  # [B, Hk, M, D]
    data,  # [B·Hk, D', M'/2] uint8
    scales,  # [B·Hk, M'/128, D', 8] uint8
    scale,  # [B·Hk, D'] float32
    heads, count, padded, size,
    NATIVE: tl.constexpr, TOGETHER: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1)
    rows = block * BLOCK_R + tl.arange(0, BLOCK_R)
    channels = tl.arange(0, BLOCK_D)
    tile = load_rows(v, v_b, v_h, v_n, v_d, heads, head, rows, count, size, BLOCK_D)
    place = head.to(tl.int64) * BLOCK_D + channels
    values = tl.trans(tile.to(tl.float32)) * (1.0 / tl.load(scale + place))[:, None]
    packed, codes = nvfp4(values, NATIVE, True, BLOCK_D, BLOCK_R)
    pairs = block * (BLOCK_R // 2) + tl.arange(0, BLOCK_R // 2)
    tl.store(data + place[:, None] * (padded // 2) + pairs[None, :], packed)
    start = block * BLOCK_R
    own = head.to(tl.int64) * (padded // TOGETHER) + start // TOGETHER
    groups = start % TOGETHER // 16 + tl.arange(0, BLOCK_R // 16)
    at = (own * BLOCK_D + channels)[:, None] * (TOGETHER // 16) + groups[None, :]
    tl.store(scales + at, codes)


@triton.jit(do_not_specialize=(*VARYING, "first", "blocks"))
def _corrections_kernel(
    means,  # [B·H, N'/128, D'] float32
    k, k_b, k_h, k_n, k_d,  # [B, Hk, M, D]
    k_mean,  # [B·Hk, MEAN_D] float32
    out,  # [B·H, count, M'] float32
    heads, first, blocks, count, keys, padded, size,
    SHARED: tl.constexpr, MEAN_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(2)
    rows = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    channels = tl.arange(0, BLOCK_D)
    place = (head.to(tl.int64) * blocks + first + rows)[:, None] * BLOCK_D + channels[None, :]
    mean = tl.load(means + place, (rows < count)[:, None], 0.0)
    vector = tl.load(k_mean + head // SHARED * MEAN_D + channels, channels < MEAN_D, 0.0)
    tile = load_rows(k, k_b, k_h, k_n, k_d, heads, head // SHARED, columns, keys, size, BLOCK_D)
    # In 16 bit, twice: the second product holds what the first one's rounding lost. K as it came is
    # exact, and what its mean adds is the same for all keys.
    whole = power_of_two_scale(tl.max(tl.max(tl.abs(mean), 1), 0))
    scaled = mean * (1.0 / whole)
    high = scaled.to(tile.dtype)
    low = (scaled - high.to(tl.float32)).to(tile.dtype)
    scores = tl.dot(low, tl.trans(tile))
    scores = tl.dot(high, tl.trans(tile), scores) * whole
    scores -= tl.sum(mean * vector[None, :], 1)[:, None]
    at = (head.to(tl.int64) * count + rows)[:, None] * padded + columns[None, :]
    tl.store(out + at, scores, (rows < count)[:, None])
