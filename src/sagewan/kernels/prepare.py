"""Q, K and V made ready for the attention kernels: smoothed, rotated and quantised.

Each tensor is read twice: once for its mean (or its largest values), once to quantise it; nothing
but the quantised form is written. The inputs stay as they are.

Subtracting any vector from every row of K changes each row of scores by a constant, which softmax
ignores. What Q's mean would have added to the score of a key is kept as that key's ``bias``. The
rotation is orthogonal and applied to both, so it leaves the scores alone; it spreads an outlying
channel over all. After SageAttention (arXiv:2410.02367), SageAttention2 (arXiv:2411.10958) and
QuaRot (arXiv:2404.00456).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sagewan.kernels.launch import (
    VARYING,
    Repeated,
    Schedule,
    block_of,
    compute_capability,
    strided,
)
from sagewan.kernels.prepared import PADDING, Columns, Rows
from sagewan.kernels.sequence import SAMPLED_FROM, largest, load_rows

_ROWS = 64
# Blocks of rows that share one rotation matrix, which takes longer to make than to use. Where
# shared memory is plenty, more of them, read ahead, if all multiprocessors have work even so.
_BLOCKS, _MANY_BLOCKS = 8, 32
_PLENTY_SMS = (90, 100, 103)
_MAX_ROTATION = 128
_SCHEDULE = Schedule(warps=8)
# Two blocks of 256 threads share a multiprocessor.
_AHEAD = Schedule(warps=8, stages=3, registers=128)
# Rows of so many that eight warps could not hold them; and where products come from a memory of
# their own, since with fewer warps Triton 3.6 and 3.7 fail to find the largest value of a block.
_WIDE = Schedule(warps=16, registers=128)
_ROTATED_APART_SMS = (100, 103)
# 1.5·2²³: a float32 this large has no fraction, so adding it rounds to the nearest even integer.
_ROUND = tl.constexpr(12582912.0)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How :func:`int8_rows` treats a tensor. The rows of a block share a scale; ``factor``
    multiplies what is quantised, and ``dot_factor`` the dots, which are of the smoothed rows if
    ``smoothed``, else of the rows as they came.

    ``along``: rows are rounded so that their error has little along themselves. A key that a query
    attends to is one that is like it, so that is the part of the error that its score would show.
    """

    block: int = _ROWS
    rotate: bool = False
    factor: float = 1.0
    dot_factor: float = 1.0
    smoothed: bool = False
    along: bool = False


def int8_rows(
    x: Tensor,
    recipe: Recipe,
    *,
    minus: Tensor | None = None,
    other: Tensor | None = None,
    lowest: Tensor | None = None,
) -> Rows:
    """x [B, H, N, D], 16 bit → its rows, minus ``minus`` [B, H, D'], as INT8.

    ``other`` [B, Ho, D'], with Ho or H a multiple of the other, asks for the rows' dots with it;
    ``lowest`` [B, H] float32 is the least that a scale may be.
    """
    batch, heads, count, size = x.shape
    block, padded = block_of(size), triton.cdiv(count, PADDING) * PADDING
    others = other.shape[1] if other is not None else 0
    dots = None
    if other is not None:
        dots = x.new_empty(batch, max(heads, others), padded, dtype=torch.float32)
    rows = Rows(
        data=x.new_empty(batch, heads, padded, block, dtype=torch.int8),
        scale=x.new_empty(batch, heads, padded, dtype=torch.float32),
        rows_per_scale=recipe.block,
        dots=dots,
    )
    sm = compute_capability(x.device)
    many = count >= SAMPLED_FROM and sm in _PLENTY_SMS
    blocks = (_MANY_BLOCKS if many else _BLOCKS) if recipe.rotate else 1
    arguments = {
        **strided("x", x),
        "minus": minus,
        "other": other,
        "lowest": lowest,
        "data": rows.data,
        "scales": rows.scale,
        "dots": dots,
        "heads": heads,
        "count": count,
        "padded": padded,
        "size": size,
        "factor": recipe.factor,
        "dot_factor": recipe.dot_factor,
        "EACH": max(1, others // heads),
        "SHARED": max(1, heads // others) if others else 1,
        "ROTATION": min(_MAX_ROTATION, size & -size) if recipe.rotate else 0,
        "SMOOTHED": recipe.smoothed,
        "WIDTH": min(_MAX_ROTATION, block),
        "ALONG": recipe.along,
        "BLOCKS": blocks,
        "BLOCK_R": recipe.block,
        "BLOCK_D": block,
    }
    grid = (triton.cdiv(padded // recipe.block, blocks), batch * heads, 1)
    launch = _launch_many_rows if blocks == _MANY_BLOCKS else _launch_rows
    if recipe.block > _ROWS or (recipe.rotate and sm in _ROTATED_APART_SMS):
        launch = _launch_wide_rows
    launch(None, grid, x.device, arguments)
    return rows


def e4m3_columns(v: Tensor, highest: float) -> Columns:
    """V [B, Hk, M, D], 16 bit → FP8 e4m3 with a scale per channel that maps its largest
    magnitude to ``highest``, transposed, so that the tensor cores find each channel's keys in a
    row.

    Each 16 keys are stored in the order 0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15: a
    thread then holds as scores of Q·Kᵀ just the keys that it must hand to the FP8 product.
    """
    batch, heads, count, size = v.shape
    block, padded = block_of(size), triton.cdiv(count, PADDING) * PADDING
    scale = largest(v, highest)
    data = v.new_empty(batch, heads, block, padded, dtype=torch.float8_e4m3fn)
    arguments = {
        **strided("v", v),
        "data": data,
        "scales": scale,
        "heads": heads,
        "count": count,
        "padded": padded,
        "size": size,
        "BLOCK_R": _ROWS,
        "BLOCK_D": block,
    }
    grid = (padded // _ROWS, batch * heads, 1)
    _launch_columns(None, grid, v.device, arguments)
    return Columns(data=data, scale=scale)


@triton.jit
def _parity(bits):
    bits = bits ^ (bits >> 4)
    bits = bits ^ (bits >> 2)
    return (bits ^ (bits >> 1)) & 1


@triton.jit
def _rotation(SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """[WIDTH, WIDTH] of −1, 0 and 1: a Hadamard matrix for each SIZE channels, with signs so that
    no Walsh function, a constant least of all, ends in one channel."""
    rows = tl.arange(0, WIDTH)[:, None]
    columns = tl.arange(0, WIDTH)[None, :]
    local = rows % SIZE
    odd = _parity(local & columns) ^ _parity(local & (local >> 1) & 0x55)
    return tl.where(rows // SIZE == columns // SIZE, 1.0 - 2.0 * odd.to(tl.float32), 0.0)


@triton.jit
def _rotated(vector, matrix, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    parts = vector.reshape(BLOCK_D // WIDTH, WIDTH, 1) * matrix[None, :, :]
    return tl.sum(parts, 1).reshape(BLOCK_D)


@triton.jit
def _store_dots(seen, means, dots, head, rows, padded, factor, EACH: tl.constexpr):
    """What rows give with each of the other tensor's means that share their head."""
    for i in tl.static_range(EACH):
        dot = tl.sum(seen * means[i][None, :], 1) * factor
        tl.store(dots + (head * EACH + i).to(tl.int64) * padded + rows, dot)


@triton.jit
def _error_along(values, tried):
    """What rounding ``tried`` instead of ``values`` is off by along each row, times its length."""
    return tl.sum(((tried + _ROUND) - _ROUND - values) * values, 1)


@triton.jit
def _stretched(values):
    """Rows [R, D] so much longer or shorter that they are rounded with little error along
    themselves: by as much as the rounding, tried before, shortened them, or half of it more or
    less."""
    over = _error_along(values, values) / tl.maximum(tl.sum(values * values, 1), 1e-30)
    best = values * (1.0 - over)[:, None]
    least = tl.abs(_error_along(values, best))
    for i in tl.static_range(2):
        tried = values * (1.0 - (0.5 + i) * over)[:, None]
        error = tl.abs(_error_along(values, tried))
        best = tl.where((error < least)[:, None], tried, best)
        least = tl.minimum(error, least)
    # The longest row may not leave the range.
    return tl.clamp(best, -127.0, 127.0)


@triton.jit(do_not_specialize=VARYING)
def _int8_rows_kernel(
    x, x_b, x_h, x_n, x_d,  # [B, H, N, D]
    minus,  # [B·H, D'] float32, or None
    other,  # [B·Ho, D'] float32, or None
    lowest,  # [B·H] float32, or None
    data,  # [B·H, N', D'] int8
    scales,  # [B·H, N'] float32
    dots,  # [B·max(H, Ho), N'] float32, or None
    heads, count, padded, size, factor, dot_factor,
    EACH: tl.constexpr, SHARED: tl.constexpr, ROTATION: tl.constexpr, SMOOTHED: tl.constexpr,
    WIDTH: tl.constexpr, ALONG: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    channels = tl.arange(0, BLOCK_D)
    if minus is not None:
        taken = tl.load(minus + head * BLOCK_D + channels)
    means = ()
    if other is not None:
        for i in tl.static_range(EACH):
            of_mean = other + (head * EACH + i) // SHARED * BLOCK_D
            means = means + (tl.load(of_mean + channels),)
    if ROTATION > 0:
        # The tensor cores add 16-bit values times ±1 exactly to float32's precision, so x is
        # rotated as it came, and its mean apart. The matrix is made once for several blocks.
        matrix = _rotation(ROTATION, WIDTH)
        if minus is not None:
            taken = _rotated(taken, matrix, WIDTH, BLOCK_D)
        if other is not None and SMOOTHED:
            # Their dots are those of the rotated rows, but for the rotation's own length.
            as_they_came = means
            means = ()
            for i in tl.static_range(EACH):
                means = means + (_rotated(as_they_came[i], matrix, WIDTH, BLOCK_D) / ROTATION,)
    first = tl.program_id(0) * BLOCKS
    for block in range(first, tl.minimum(first + BLOCKS, padded // BLOCK_R)):
        rows = block * BLOCK_R + tl.arange(0, BLOCK_R)
        raw = load_rows(x, x_b, x_h, x_n, x_d, heads, head, rows, count, size, BLOCK_D)
        if other is not None and not SMOOTHED:
            _store_dots(raw.to(tl.float32), means, dots, head, rows, padded, dot_factor, EACH)
        if ROTATION > 0:
            wide = raw.reshape(BLOCK_R * BLOCK_D // WIDTH, WIDTH)
            values = tl.dot(wide, matrix.to(raw.dtype)).reshape(BLOCK_R, BLOCK_D)
        else:
            values = raw.to(tl.float32)
        if minus is not None:
            values = tl.where((rows < count)[:, None], values - taken[None, :], 0.0)
        if other is not None and SMOOTHED:
            _store_dots(values, means, dots, head, rows, padded, dot_factor, EACH)
        if ROTATION > 0:
            values *= ROTATION**-0.5
        values *= factor
        top = tl.max(tl.abs(values), 1)
        top = tl.zeros_like(top) + tl.max(top, 0)
        # Zeros, and values so small that their scale would vanish, are stored as zeros.
        scale = tl.maximum(top, 1e-30) / 127.0
        if lowest is not None:
            scale = tl.maximum(scale, tl.load(lowest + head))
        tl.store(scales + head.to(tl.int64) * padded + rows, scale)
        values /= scale[:, None]
        if ALONG:
            values = _stretched(values)
        # The low byte of such a float's bits is the integer; converting it would take a slow unit.
        quantised = (values + _ROUND).to(tl.int32, bitcast=True)
        place = (head.to(tl.int64) * padded + rows)[:, None] * BLOCK_D + channels[None, :]
        tl.store(data + place, quantised.to(tl.int8))


@triton.jit(do_not_specialize=VARYING)
def _e4m3_columns_kernel(
    v, v_b, v_h, v_n, v_d,  # [B, Hk, M, D]
    data,  # [B·Hk, D', M'] float8_e4m3fn
    scales,  # [B·Hk, D'] float32
    heads, count, padded, size,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    places = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    channels = tl.arange(0, BLOCK_D)
    # Place 4t + 2h + e of each 16 holds key 8h + 2t + e.
    low = places % 16
    keys = places - low + low % 4 // 2 * 8 + low // 4 * 2 + low % 2
    tile = load_rows(v, v_b, v_h, v_n, v_d, heads, head, keys, count, size, BLOCK_D)
    scale = tl.load(scales + head * BLOCK_D + channels)
    values = tile.to(tl.float32) / scale[None, :]
    offsets = (head.to(tl.int64) * BLOCK_D + channels)[:, None] * padded + places[None, :]
    tl.store(data + offsets, tl.trans(values.to(tl.float8e4nv)))


# A call of the fastest mode prepares in less than a millisecond: looking its kernels up would take
# as long again.
_launch_rows = Repeated(_int8_rows_kernel, _SCHEDULE)
_launch_many_rows = Repeated(_int8_rows_kernel, _AHEAD)
_launch_wide_rows = Repeated(_int8_rows_kernel, _WIDE)
_launch_columns = Repeated(_e4m3_columns_kernel, _SCHEDULE)
