"""Attention with NVFP4 in both products, in Triton, for Blackwell; emulated on other GPUs.

Each 16 values share an e4m3 scale. Q is smoothed by the mean of each 128 rows, and what that took
from the scores is the first product's accumulator. P is scaled at two levels: its row's largest
value in the step becomes 448·6, so that the e4m3 scales use their range; the float32 accumulator
follows that reference from step to step, which costs no more than following the running maximum. On
compute capability 10.0 and newer the tensor cores multiply NVFP4. Elsewhere, and under the
interpreter, the same numbers are unpacked to float16, which holds them exactly: to judge their
quality, not for speed. Two halves, ``prepare_sageattn_3_fp4`` and ``attend``, which takes a mask of
blocks; no other mask, no causal order, no dropout, no gradient. After SageAttention3
(arXiv:2505.11594).
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from sagewan.kernels.fp4 import nvfp4, unpacked
from sagewan.kernels.int8_attention import lists, outputs
from sagewan.kernels.key_blocks import BLOCK, key_of, walk
from sagewan.kernels.launch import VARYING, Tile, check, compute_capability, launch, strided
from sagewan.kernels.online import normalised, store_lse, store_output
from sagewan.kernels.operators import operator
from sagewan.kernels.prepare_fp4 import (
    block_d_of,
    corrections,
    fp4_columns,
    fp4_keys,
    fp4_queries,
    is_native,
)
from sagewan.kernels.prepared import PreparedFp4, Smoothing
from sagewan.kernels.query_key import LOG2E
from sagewan.kernels.sequence import mean

_BLOCK = tl.constexpr(BLOCK)
_P_MAX = tl.constexpr(448.0 * 6.0)
_LOG2_P_MAX = tl.constexpr(math.log2(448.0 * 6.0))
# How far, in powers of two, a row's reference may be below the highest score yet: the accumulator,
# which is held relative to it, stays far from float32's end, and what lies below weighs nothing.
_HEADROOM = tl.constexpr(60.0)


def tile_for(sm: int, block_d: int) -> Tile:
    """The fixed configuration of a compute capability and a head size inside the kernel."""
    if block_d > 128:
        # 10.0 and 10.3 multiply 128 rows at once, and keep the sums out of the registers.
        return Tile(block_m=128 if sm in (100, 103) else 64, block_n=64, warps=8, stages=1)
    if sm in (100, 103):
        return Tile(block_m=128, block_n=128, warps=8, stages=2)
    # In registers, 128 keys would not fit beside the sums.
    return Tile(block_m=128, block_n=64, warps=8, stages=3 if is_native(sm) else 1)


def sageattn_3_fp4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    block_mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """q [B, H, N, D], k and v [B, Hk, M, D], bf16 or fp16, any strides → [B, H, N, D].

    ``scale`` defaults to D**-0.5; ``return_lse`` adds the natural log-sum-exp [B, H, N] float32;
    ``block_mask`` is as :func:`attend`'s. Raises ShapeError for what
    :func:`sagewan.kernels.launch.check` refuses.
    """
    return _sageattn_3_fp4(q, k, v, scale, return_lse, block_mask)


def prepare_sageattn_3_fp4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    k_mean: Tensor | None = None,
    with_lse: bool = False,
) -> PreparedFp4:
    """The first half of :func:`sageattn_3_fp4`; arguments as
    :func:`sagewan.kernels.int8_attention.prepare_sageattn`'s."""
    check(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k_mean = mean(k) if k_mean is None else k_mean
    other = k_mean if with_lse else None
    queries, means = fp4_queries(q, scale * LOG2E, other=other, dot_factor=scale)
    return PreparedFp4(
        q=queries,
        k=fp4_keys(k, k_mean),
        v=fp4_columns(v),
        queries=q.shape[2],
        keys=v.shape[2],
        head_dim=q.shape[3],
        dtype=q.dtype,
        smoothing=Smoothing(means=means, k=k, k_mean=k_mean),
    )


def attend(
    prepared: PreparedFp4,
    *,
    block_mask: Tensor | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The second half of :func:`sageattn_3_fp4`; arguments as
    :func:`sagewan.kernels.int8_attention.attend`'s."""
    out, lse = outputs(prepared, out, return_lse=return_lse)
    blocks = lists(prepared, block_mask)
    count, some = prepared.smoothing.means.shape[2], _blocks_at_a_time(prepared)
    for first in range(0, count, some):
        _attend_some(prepared, out, lse, blocks, range(first, min(first + some, count)))
    return out if lse is None else (out, lse)


def _blocks_at_a_time(prepared: PreparedFp4) -> int:
    """How many blocks of queries, of all heads, to serve by one launch, so that their corrections
    take no more memory than Q does."""
    bytes_of_q = prepared.queries * prepared.head_dim * prepared.dtype.itemsize
    bytes_of_a_block = 4 * prepared.k.data.shape[2]
    return max(1, bytes_of_q // bytes_of_a_block)


def _attend_some(
    prepared: PreparedFp4,
    out: Tensor,
    lse: Tensor | None,
    lists_of_blocks: dict[str, object],
    blocks: range,
) -> None:
    """Serve some blocks of 128 queries of every head."""
    q, k, v = prepared.q, prepared.k, prepared.v
    batch, heads, count, size = out.shape
    sm, block_d = compute_capability(out.device), block_d_of(size)
    tile = tile_for(sm, block_d)
    arguments = {
        "q": q.data,
        "q_scales": q.scales,
        "q_scale": q.scale,
        "q_dots": q.dots,
        "k": k.data,
        "k_scales": k.scales,
        "k_scale": k.scale,
        "v": v.data,
        "v_scales": v.scales,
        "v_scale": v.scale,
        "correction": corrections(prepared.smoothing, blocks.start, len(blocks)),
        **strided("o", out),
        "lse": lse,
        **lists_of_blocks,
        "heads": heads,
        "count": count,
        "count_padded": q.data.shape[2],
        "keys": prepared.keys,
        "keys_padded": k.data.shape[2],
        "size": size,
        "first_block": blocks.start,
        "correction_blocks": len(blocks),
        "SHARED": heads // k.data.shape[1],
        "NATIVE": is_native(sm),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": block_d,
    }
    grid = (len(blocks) * BLOCK // tile.block_m, batch * heads)
    launch(_fp4_attention_kernel, grid, out.device, arguments, tile)


_sageattn_3_fp4 = operator("sageattn_3_fp4", prepare_sageattn_3_fp4, attend)


@triton.jit
def _group_of(key, SIZE: tl.constexpr = BLOCK):
    """The block of a key, and its group of 16 within it."""
    return key // SIZE, key % SIZE // 16


@triton.jit
def _step(
    acc, total, highest, reference,  # [M, D'], [M], [M], [M]
    q, q_scales, q_scale,  # [M, D'/2] and [M, D'/16], or [M, D'] float16; one number
    k, k_scales, k_scale, v, v_scales, correction, start, keys, keys_padded,
    MASKED: tl.constexpr, NATIVE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    columns = start + tl.arange(0, BLOCK_N)
    k_tile = tl.load(k + columns[:, None] * (BLOCK_D // 2) + tl.arange(0, BLOCK_D // 2)[None, :])
    k_codes = tl.load(
        k_scales + columns[:, None] * (BLOCK_D // 16) + tl.arange(0, BLOCK_D // 16)[None, :]
    )
    # The factor is a power of two: dividing by it is exact.
    factor = q_scale * tl.load(k_scale + start // _BLOCK)
    smooth = tl.load(correction + columns) * (1.0 / factor)
    s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) + smooth[None, :]
    if NATIVE:
        s = tl.dot_scaled(
            q, q_scales, "e2m1",
            tl.trans(k_tile), k_codes.to(tl.float8e4nv, bitcast=True), "e2m1", s,
        )  # fmt: skip
    else:
        s = tl.dot(q, tl.trans(unpacked(k_tile, k_codes, BLOCK_N, BLOCK_D)), s)
    s *= factor
    if MASKED:
        s = tl.where((columns < keys)[None, :], s, float("-inf"))
    top = tl.max(s, 1)
    highest = tl.maximum(highest, top)
    above = tl.maximum(top, highest - _HEADROOM)
    p = tl.exp2(s - (above - _LOG2_P_MAX)[:, None])
    rescale = tl.exp2(reference - above)
    total = total * rescale + tl.sum(p, 1)
    p_tile, p_codes = nvfp4(p, NATIVE, False, BLOCK_M, BLOCK_N)
    channels = tl.arange(0, BLOCK_D)
    pairs = start // 2 + tl.arange(0, BLOCK_N // 2)
    block, group = _group_of(start)
    v_tile = tl.load(v + channels[:, None] * (keys_padded // 2) + pairs[None, :])
    groups = group + tl.arange(0, BLOCK_N // 16)
    v_codes = tl.load(
        v_scales + (block * BLOCK_D + channels)[:, None] * (_BLOCK // 16) + groups[None, :]
    )
    acc *= rescale[:, None]
    if NATIVE:
        acc = tl.dot_scaled(
            p_tile, p_codes.to(tl.float8e4nv, bitcast=True), "e2m1",
            tl.trans(v_tile), v_codes.to(tl.float8e4nv, bitcast=True), "e2m1", acc,
        )  # fmt: skip
    else:
        p16 = unpacked(p_tile, p_codes, BLOCK_M, BLOCK_N)
        acc = tl.dot(p16, tl.trans(unpacked(v_tile, v_codes, BLOCK_D, BLOCK_N)), acc)
    return acc, total, highest, above


@triton.jit(do_not_specialize=(*VARYING, "first_block", "correction_blocks"))
def _fp4_attention_kernel(
    q, q_scales, q_scale,  # [B·H, N', D'/2], [B·H, N', D'/16] uint8, [B·H, N'/128]
    q_dots,  # [B·H, N'] or None
    k, k_scales, k_scale,  # [B·Hk, M', D'/2], [B·Hk, M', D'/16] uint8, [B·Hk, M'/128]
    v, v_scales, v_scale,  # [B·Hk, D', M'/2], [B·Hk, M'/128, D', 8] uint8, [B·Hk, D']
    correction,  # [B·H, correction_blocks, M'] float32
    o, o_b, o_h, o_n, o_d,  # [B, H, N, D]
    lse,  # [B·H, N] or None
    blocks, block_counts, block_tails, block_b, block_h,  # key_blocks.KeyBlocks, or None
    heads, count, count_padded, keys, keys_padded, size, first_block, correction_blocks,
    SHARED: tl.constexpr, NATIVE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    row_block = first_block + tl.program_id(0) * BLOCK_M // _BLOCK
    rows = first_block * _BLOCK + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    place = head.to(tl.int64) * count_padded + rows
    queries = tl.load(q + place[:, None] * (BLOCK_D // 2) + tl.arange(0, BLOCK_D // 2)[None, :])
    codes = tl.load(
        q_scales + place[:, None] * (BLOCK_D // 16) + tl.arange(0, BLOCK_D // 16)[None, :]
    )
    if NATIVE:
        codes = codes.to(tl.float8e4nv, bitcast=True)
    else:
        queries = unpacked(queries, codes, BLOCK_M, BLOCK_D)
    block_scale = tl.load(q_scale + head.to(tl.int64) * (count_padded // _BLOCK) + row_block)
    key_head = (head // SHARED).to(tl.int64)
    k += key_head * keys_padded * (BLOCK_D // 2)
    k_scales += key_head * keys_padded * (BLOCK_D // 16)
    k_scale += key_head * (keys_padded // _BLOCK)
    v += key_head * BLOCK_D * (keys_padded // 2)
    v_scales += key_head * BLOCK_D * (keys_padded // 16)
    own = head.to(tl.int64) * correction_blocks + row_block - first_block
    correction += own * keys_padded
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    reference = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    list_place, whole, tail, end = walk(
        block_counts, block_tails, block_b, block_h, heads, head, row_block, keys, BLOCK_N
    )
    for position in range(0, whole, BLOCK_N):
        start = key_of(blocks, list_place, position, BLOCK_N)
        acc, total, highest, reference = _step(
            acc, total, highest, reference, queries, codes, block_scale, k, k_scales, k_scale, v,
            v_scales, correction, start, keys, keys_padded, False, NATIVE, BLOCK_M, BLOCK_N,
            BLOCK_D,
        )  # fmt: skip
    for start in range(tail, end, BLOCK_N):
        acc, total, highest, reference = _step(
            acc, total, highest, reference, queries, codes, block_scale, k, k_scales, k_scale, v,
            v_scales, correction, start, keys, keys_padded, True, NATIVE, BLOCK_M, BLOCK_N,
            BLOCK_D,
        )  # fmt: skip
    channel_scale = tl.load(v_scale + key_head * BLOCK_D + tl.arange(0, BLOCK_D))
    out = normalised(acc, total) * channel_scale[None, :]
    store_output(out, o, o_b, o_h, o_n, o_d, heads, head, rows, count, size, BLOCK_D)
    if lse is not None:
        store_lse(lse, q_dots, head, rows, count, count_padded, reference, total / _P_MAX)
