"""What the attention kernels in Triton share: scores as integers, and how rows begin and end.

Scores stay integers until the exponential. The accumulator of Q·Kᵀ starts at the bits of 1.5·2²³ as
a float, plus the key's bias counted in the score's own units: the integer sum is then, read as a
float, 1.5·2²³ + score, and converting, scaling and adding the bias cost one multiply-add in the
exponent. Their order as integers is their order as floats. A block's rows share a scale, and so do
the keys of a step.
"""

import math

import triton
import triton.language as tl

from sagewan.kernels.query_key import ROWS_PER_SCALE

_LN2 = tl.constexpr(math.log(2.0))
_ROWS_PER_SCALE = tl.constexpr(ROWS_PER_SCALE)
_BASE = tl.constexpr(12582912.0)  # 1.5·2²³
# Minus infinity as a float; below every score as an integer, too.
_LOWEST = tl.constexpr(-0x800000)
# Where a score's unit is worth no more, in powers of two, the exponent's offset, which holds the
# base times that, is exact to a hundredth.
_MOST_FACTOR = tl.constexpr(2.0**-7)
_LEAST_FACTOR = tl.constexpr(1e-37)
_SCALES_AT_ONCE = tl.constexpr(1024)


@triton.jit
def load_queries(q, q_scale, head, count_padded, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """→ rows [M], their data [M, D'] int8 and the scale that they share."""
    first = tl.program_id(0) * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    place = head.to(tl.int64) * count_padded
    data = tl.load(q + (place + rows)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :])
    return rows, data, tl.load(q_scale + place + first)


@triton.jit
def exact_keys(row_scale, k_scale, keys_padded, count):
    """``count``, or 0 if a score's unit is worth so much for some key that the base must be taken
    off before the exponent."""
    most = tl.zeros((_SCALES_AT_ONCE,), tl.float32)
    for first in range(0, keys_padded, _SCALES_AT_ONCE * _ROWS_PER_SCALE):
        places = first + tl.arange(0, _SCALES_AT_ONCE) * _ROWS_PER_SCALE
        scale = tl.load(k_scale + places, mask=places < keys_padded, other=0.0)
        most = tl.maximum(most, scale)
    return tl.where(row_scale * tl.max(most, 0) > _MOST_FACTOR, 0, count)


@triton.jit
def of_keys(k_scale, k_bias, start, BLOCK_N: tl.constexpr):
    """→ the scale of the keys of a step, and their biases [N], or zero."""
    bias = 0.0
    if k_bias is not None:
        bias = tl.load(k_bias + start + tl.arange(0, BLOCK_N))
    return tl.load(k_scale + start), bias


@triton.jit
def scores(
    q, q_scale,  # [M, D'] int8, and their scale
    k, k_row,  # one head's [M', D'] int8; or with TMA the descriptor of all, and the head's row
    scale, bias,  # of_keys
    start, keys, highest,
    ANY: tl.constexpr, BIASED: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """→ x [M, N], a factor and an offset [M], so that P is 2 to x · factor + offset, and the new
    highest score [M], in powers of two. ``ANY`` is for keys beyond the last, and for factors that
    :func:`exact_keys` refuses."""
    columns = start + tl.arange(0, BLOCK_N)
    if TMA:
        tile = k.load([k_row + start, 0])
    else:
        tile = tl.load(k + columns[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :])
    factor = tl.maximum(q_scale * scale, _LEAST_FACTOR)
    begin = tl.full((BLOCK_N,), _BASE, tl.float32)
    if BIASED:
        # A division would take eight instructions.
        root = tl.rsqrt(factor)
        begin = bias * (root * root) + _BASE
    begin = tl.broadcast_to(begin.to(tl.int32, bitcast=True)[None, :], (BLOCK_M, BLOCK_N))
    s = tl.dot(q, tl.trans(tile), begin, out_dtype=tl.int32)
    if ANY:
        s = tl.where((columns < keys)[None, :], s, _LOWEST)
    largest = (tl.max(s, 1).to(tl.float32, bitcast=True) - _BASE) * factor
    above = tl.maximum(highest, largest)
    x = s.to(tl.float32, bitcast=True)
    offset = -above
    if ANY:
        x -= _BASE
    else:
        offset -= _BASE * factor
    return x, factor, offset, above


@triton.jit
def partial_sums(p, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """P [M, N] → sums of each eighth key of its rows, [M, 8]: what a thread holds of them, so that
    threads exchange sums once at the end instead of in each step."""
    return tl.sum(p.reshape(BLOCK_M, BLOCK_N // 8, 8), 1)


@triton.jit
def store_lse(lse, q_dots, head, rows, count, count_padded, highest, total):
    """The log of the sum, with what smoothing K took from every score of a row."""
    removed = tl.load(q_dots + head.to(tl.int64) * count_padded + rows)
    # Minus infinity, as highest is, where a row attended to nothing.
    value = (highest + tl.log2(tl.where(total > 0, total, 1.0))) * _LN2 + removed
    tl.store(lse + head.to(tl.int64) * count + rows, value, mask=rows < count)


@triton.jit
def normalised(acc, total):
    """Rows that attended to nothing are zero."""
    return acc / tl.where(total > 0, total, 1.0)[:, None]


@triton.jit
def store_output(
    values, o, o_b, o_h, o_n, o_d, heads, head, rows, count, size, BLOCK_D: tl.constexpr
):
    channels = tl.arange(0, BLOCK_D)
    base = (head // heads).to(tl.int64) * o_b + (head % heads).to(tl.int64) * o_h
    offsets = rows.to(tl.int64)[:, None] * o_n + channels[None, :] * o_d
    mask = (rows < count)[:, None] & (channels < size)[None, :]
    tl.store(o + base + offsets, values.to(o.dtype.element_ty), mask=mask)
