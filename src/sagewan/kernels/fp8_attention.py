"""Attention with INT8 Q·Kᵀ and FP8 P·V, in Triton, for compute capability 8.9 and newer.

:func:`sageattn_3_fp8` prepares Q and K as ``sageattn_3``. P and V multiply in e4m3, V with a scale
per channel. P is at most 1 and is scaled to the top of e4m3's range, or small probabilities would
underflow. Sums are kept at two levels, because Hopper's FP8 accumulator has 14 bits: each step's
P·V is added to a float32 accumulator by the multiply-add that rescales it. Two halves,
``prepare_sageattn_3_fp8`` and ``attend``, which takes a mask of blocks; no other mask, no causal
order, no dropout, no gradient. After SageAttention2 (arXiv:2411.10958).
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from sagewan.kernels.int8_attention import lists, outputs
from sagewan.kernels.key_blocks import BLOCK, any_key_of, key_of, walk
from sagewan.kernels.launch import (
    VARYING,
    Tile,
    block_of,
    check,
    compute_capability,
    copied,
    launch,
    strided,
)
from sagewan.kernels.online import (
    exact_keys,
    load_queries,
    normalised,
    of_keys,
    partial_sums,
    scores,
    store_lse,
    store_output,
)
from sagewan.kernels.operators import operator
from sagewan.kernels.prepare import e4m3_columns
from sagewan.kernels.prepared import Columns, Prepared, Rows
from sagewan.kernels.query_key import check_grain, grain_of, smoothed, whole

E4M3_MAX = 448.0
_P_MAX = tl.constexpr(E4M3_MAX)
_LOG2_P_MAX = tl.constexpr(math.log2(E4M3_MAX))
_BLOCK = tl.constexpr(BLOCK)
# On consumer cards FP8 products that add in float32 run at half rate, so a step's keys add in
# float16, which holds 65504: 64 keys · P up to 448 · V up to 1.75 = 50176, and each of 64 sums may
# round up by 2⁻¹¹, to 51768 at most.
HALF_SUM_SMS = (89, 120, 121)
HALF_SUM_V_MAX = 1.75
HALF_SUM_KEYS = 64


def tile_for(sm: int, block_d: int) -> Tile:
    """The fixed configuration of a compute capability and a head size inside the kernel."""
    if block_d > 128:
        return Tile(block_m=64, block_n=32, warps=8, stages=2)
    if sm == 90:
        # Small blocks, three to a multiprocessor, so that one's products overlap with another's
        # exponentials: they leave each thread 168 registers.
        return Tile(block_m=64, block_n=128, warps=4, stages=2, registers=168, tma=True)
    return Tile(block_m=128, block_n=64, warps=8, stages=2)


def sageattn_3_fp8(
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
    return _sageattn_3_fp8(q, k, v, scale, return_lse, block_mask)


def prepare_sageattn_3_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    k_mean: Tensor | None = None,
    with_lse: bool = False,
) -> Prepared[Rows, Columns]:
    """The first half of :func:`sageattn_3_fp8`; arguments as
    :func:`sagewan.kernels.int8_attention.prepare_sageattn`'s. V's largest magnitudes are what the
    sums of this GPU can hold: ``HALF_SUM_V_MAX`` on the cards of ``HALF_SUM_SMS``."""
    check(q, k, v)
    sm = compute_capability(q.device)
    grain = grain_of(tile_for(sm, block_of(q.shape[3])))
    # The longest first: while it runs, the small ones are launched.
    columns = e4m3_columns(v, HALF_SUM_V_MAX if sm in HALF_SUM_SMS else E4M3_MAX)
    rows = smoothed(q, k, scale, grain, k_mean=k_mean, with_lse=with_lse, along=False)
    return whole(q, k, rows, columns)


def attend(
    prepared: Prepared[Rows, Columns],
    *,
    block_mask: Tensor | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The second half of :func:`sageattn_3_fp8`; arguments as
    :func:`sagewan.kernels.int8_attention.attend`'s."""
    q, k, v = prepared.q, prepared.k, prepared.v
    out, lse = outputs(prepared, out, return_lse=return_lse)
    batch, heads, count, size = out.shape
    sm = compute_capability(out.device)
    block_d = block_of(size)
    tile = tile_for(sm, block_d)
    check_grain(prepared, grain_of(tile))
    k_tiles = copied(k.data.view(-1, block_d), (tile.block_n, block_d))
    v_tiles = copied(v.data.view(-1, v.data.shape[3]), (block_d, tile.block_n))
    tma = tile.tma and None not in (k_tiles, v_tiles)
    arguments = {
        "q": q.data,
        "q_scale": q.scale,
        "q_dots": q.dots,
        "k": k_tiles if tma else k.data,
        "k_scale": k.scale,
        "k_bias": k.dots,
        "v": v_tiles if tma else v.data,
        "v_scale": v.scale,
        **strided("o", out),
        "lse": lse,
        **lists(prepared, block_mask),
        "heads": heads,
        "shared": heads // k.data.shape[1],
        "count": count,
        "count_padded": q.data.shape[2],
        "keys": prepared.keys,
        "keys_padded": k.data.shape[2],
        "size": size,
        "HALF_SUMS": sm in HALF_SUM_SMS,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": block_d,
        "TMA": tma,
        "AHEAD": tile.ahead,
    }
    grid = (triton.cdiv(count, tile.block_m), batch * heads)
    launch(_fp8_attention_kernel, grid, out.device, arguments, tile)
    return out if lse is None else (out, lse)


_sageattn_3_fp8 = operator("sageattn_3_fp8", prepare_sageattn_3_fp8, attend)


@triton.jit
def _as_stored(p, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """P's columns in the order of V's keys (prepare.e4m3_columns): no value leaves its thread."""
    p = p.reshape(BLOCK_M, BLOCK_N // 16, 2, 4, 2)
    return p.permute(0, 1, 3, 2, 4).reshape(BLOCK_M, BLOCK_N)


@triton.jit
def _step(
    acc, total, highest,  # [M, D'], [M, 8], [M]
    q, q_scale, k, k_row, scale, bias, v, v_row, start, keys, keys_padded,
    ANY: tl.constexpr, HALF_SUMS: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    x, factor, offset, above = scores(
        q, q_scale, k, k_row, scale, bias, start, keys, highest, ANY, True, TMA, BLOCK_M,
        BLOCK_N, BLOCK_D,
    )  # fmt: skip
    p = tl.exp2(x * factor + (offset + _LOG2_P_MAX)[:, None])
    rescale = tl.exp2(highest - above)
    total = total * rescale[:, None] + partial_sums(p, BLOCK_M, BLOCK_N)
    if TMA:
        tile = v.load([v_row, start])
    else:
        places = start + tl.arange(0, BLOCK_N)
        tile = tl.load(v + tl.arange(0, BLOCK_D)[:, None] * keys_padded + places[None, :])
    p = _as_stored(p.to(tl.float8e4nv), BLOCK_M, BLOCK_N)
    if HALF_SUMS:
        added = tl.dot(p, tl.trans(tile), out_dtype=tl.float16).to(tl.float32)
    else:
        added = tl.dot(p, tl.trans(tile))
    return acc * rescale[:, None] + added, total, above


@triton.jit(do_not_specialize=VARYING)
def _fp8_attention_kernel(
    q, q_scale, q_dots,  # [B·H, N', D'] int8, [B·H, N'], [B·H, N'] or None
    k, k_scale, k_bias,  # [B·Hk·M', D'] int8 or its descriptor, [B·Hk, M'], [B·H, M']
    v, v_scale,  # [B·Hk·D', M'] float8_e4m3fn or its descriptor, [B·Hk, D']
    o, o_b, o_h, o_n, o_d,  # [B, H, N, D]
    lse,  # [B·H, N] or None
    blocks, block_counts, block_tails, block_b, block_h,  # key_blocks.KeyBlocks, or None
    heads, shared, count, count_padded, keys, keys_padded, size,
    HALF_SUMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, TMA: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    rows, queries, row_scale = load_queries(q, q_scale, head, count_padded, BLOCK_M, BLOCK_D)
    key_head = head // shared
    k_row, v_row = key_head * keys_padded, key_head * BLOCK_D
    if not TMA:
        k += k_row.to(tl.int64) * BLOCK_D
        v += v_row.to(tl.int64) * keys_padded
    k_scale += k_row
    k_bias += head.to(tl.int64) * keys_padded
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M, 8), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_block = tl.program_id(0) * BLOCK_M // _BLOCK
    place, whole, tail, end = walk(
        block_counts, block_tails, block_b, block_h, heads, head, row_block, keys, BLOCK_N
    )
    exact = exact_keys(row_scale, k_scale, keys_padded, whole)
    # What keys share is needed before their scores.
    start = 0
    if exact > 0:
        start = key_of(blocks, place, 0, BLOCK_N)
    scale, bias = of_keys(k_scale, k_bias, start, BLOCK_N)
    for position in range(0, exact, BLOCK_N):
        start = key_of(blocks, place, position, BLOCK_N)
        if AHEAD:
            later = tl.minimum(position + BLOCK_N, exact - BLOCK_N)
            later = key_of(blocks, place, later, BLOCK_N)
            next_scale, next_bias = of_keys(k_scale, k_bias, later, BLOCK_N)
        else:
            scale, bias = of_keys(k_scale, k_bias, start, BLOCK_N)
        acc, total, highest = _step(
            acc, total, highest, queries, row_scale, k, k_row, scale, bias, v, v_row, start,
            keys, keys_padded, False, HALF_SUMS, TMA, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        if AHEAD:
            scale, bias = next_scale, next_bias
    for position in range(exact, whole + end - tail, BLOCK_N):
        start = any_key_of(blocks, place, position, whole, tail, BLOCK_N)
        scale, bias = of_keys(k_scale, k_bias, start, BLOCK_N)
        acc, total, highest = _step(
            acc, total, highest, queries, row_scale, k, k_row, scale, bias, v, v_row, start,
            keys, keys_padded, True, HALF_SUMS, TMA, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    total = tl.sum(total, 1)
    channel_scale = tl.load(v_scale + v_row + tl.arange(0, BLOCK_D))
    out = normalised(acc * channel_scale[None, :], total)
    store_output(out, o, o_b, o_h, o_n, o_d, heads, head, rows, count, size, BLOCK_D)
    if lse is not None:
        store_lse(lse, q_dots, head, rows, count, count_padded, highest, total / _P_MAX)
