"""Attention with INT8 Q·Kᵀ and 16-bit P·V, in Triton, for compute capability 8.0 and newer.

:func:`sageattn` smooths K and gives a scale to each block of rows; :func:`sageattn_3` smooths Q
and K, rotates both and gives a scale to each token. P·V multiplies in V's own 16-bit format and
adds in float32. No mask, no causal order, no dropout, no gradient. After SageAttention
(arXiv:2410.02367) and FlashAttention-2 (arXiv:2307.08691).
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sagewan.errors import ShapeError
from sagewan.kernels.key_blocks import BLOCK, NO_BLOCKS, key_blocks, key_of, walk
from sagewan.kernels.launch import (
    VARYING,
    Tile,
    block_of,
    check,
    compute_capability,
    launch,
    strided,
)
from sagewan.kernels.operators import operator
from sagewan.kernels.prepare import Recipe, int8_rows
from sagewan.kernels.prepared import Prepared, Rows
from sagewan.kernels.sequence import mean

LOG2E = math.log2(math.e)
_LN2 = tl.constexpr(math.log(2.0))
_BLOCK = tl.constexpr(BLOCK)
# Rows of Q and of K that share a scale in ``sageattn``; K's is also the largest step of keys.
ROWS_PER_SCALE_Q = 128
ROWS_PER_SCALE_K = 64


def tile_for(sm: int, block_d: int) -> Tile:
    """The fixed configuration of a compute capability and a head size inside the kernel."""
    if block_d > 128:
        return Tile(block_m=64, block_n=32, warps=8, stages=2)
    if sm == 90:
        # Triton does not overlap a block's products with its exponentials here: a second block
        # on the multiprocessor does, and two of 256 threads leave each thread 128 registers.
        return Tile(block_m=128, block_n=64, warps=8, stages=3, registers=128)
    # 99 KB of shared memory on 8.6, 8.9 and 12.0.
    return Tile(block_m=128, block_n=64, warps=8, stages=2)


def sageattn(
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
    return _sageattn(q, k, v, scale, return_lse, block_mask)


def sageattn_3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    block_mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """As :func:`sageattn`, with Q smoothed too, both rotated, a scale for each token, and keys
    rounded so that their error has little along themselves."""
    return _sageattn_3(q, k, v, scale, return_lse, block_mask)


def prepare_sageattn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    k_mean: Tensor | None = None,
    with_lse: bool = False,
) -> Prepared[Rows, Tensor]:
    """The first half of :func:`sageattn`: K smoothed, and a scale for each block of rows.

    ``k_mean`` [B, Hk, D'] float32 replaces K's own mean, which :func:`sequence.mean` gives: for a
    sequence that is spread over devices. ``with_lse`` prepares what the log-sum-exp needs.
    """
    check(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k_mean = mean(k) if k_mean is None else k_mean
    keys = int8_rows(k, Recipe(block=ROWS_PER_SCALE_K), minus=k_mean)
    recipe = Recipe(block=ROWS_PER_SCALE_Q, factor=scale * LOG2E, dot_factor=scale)
    queries = int8_rows(q, recipe, other=k_mean if with_lse else None)
    return _prepared(q, queries, keys, v)


def prepare_sageattn_3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    k_mean: Tensor | None = None,
    with_lse: bool = False,
) -> Prepared[Rows, Tensor]:
    """The first half of :func:`sageattn_3`; arguments as :func:`prepare_sageattn`'s."""
    check(q, k, v)
    queries, keys = fine_rows(q, k, scale, k_mean=k_mean, with_lse=with_lse, along=True)
    return _prepared(q, queries, keys, v)


def _prepared(q: Tensor, queries: Rows, keys: Rows, v: Tensor) -> Prepared[Rows, Tensor]:
    return Prepared(
        q=queries,
        k=keys,
        v=v,
        queries=q.shape[2],
        keys=v.shape[2],
        head_dim=q.shape[3],
        dtype=q.dtype,
    )


def fine_rows(
    q: Tensor,
    k: Tensor,
    scale: float | None = None,
    *,
    k_mean: Tensor | None = None,
    with_lse: bool = False,
    along: bool = False,
) -> tuple[Rows, Rows]:
    """Q and K smoothed, rotated, with a scale for each token; ``along`` is how keys are rounded.

    The keys' ``dots`` are their scores with Q's mean, in powers of two; the queries' are what the
    log-sum-exp lacks."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q_mean, k_mean = mean(q), mean(k) if k_mean is None else k_mean
    for_keys = Recipe(
        per_token=True, rotate=True, dot_factor=scale * LOG2E, smoothed=True, along=along
    )
    keys = int8_rows(k, for_keys, minus=k_mean, other=q_mean)
    recipe = Recipe(per_token=True, rotate=True, factor=scale * LOG2E, dot_factor=scale)
    queries = int8_rows(q, recipe, minus=q_mean, other=k_mean if with_lse else None)
    return queries, keys


def outputs(
    prepared: Prepared[Any, Any], out: Tensor | None, *, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Where a kernel writes: ``out`` or a new tensor [B, H, N, D], and the log-sum-exp [B, H, N]
    if it is wanted."""
    rows: Tensor = prepared.q.data
    shape = (*rows.shape[:2], prepared.queries)
    if return_lse and prepared.q.dots is None:
        raise ShapeError("the log-sum-exp was not prepared: prepare with with_lse=True")
    if out is None:
        out = rows.new_empty(*shape, prepared.head_dim, dtype=prepared.dtype)
    return out, rows.new_empty(shape, dtype=torch.float32) if return_lse else None


def lists(prepared: Prepared[Any, Any], block_mask: Tensor | None) -> dict[str, object]:
    """A kernel's arguments for a block mask, or for none."""
    if block_mask is None:
        return NO_BLOCKS
    batch, heads = prepared.q.data.shape[:2]
    size = {"queries": prepared.queries, "keys": prepared.keys}
    return key_blocks(block_mask, batch=batch, heads=heads, **size).arguments()


def attend(
    prepared: Prepared[Rows, Tensor],
    *,
    block_mask: Tensor | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The second half of :func:`sageattn` and :func:`sageattn_3` → [B, H, N, D].

    ``block_mask`` [B or 1, H or 1, ⌈N/128⌉, ⌈M/128⌉] bool is true for blocks to attend to; a row
    without any gets zeros. ``out`` [B, H, N, D], any strides, is written to and returned.
    ``return_lse`` adds the log-sum-exp [B, H, N] float32, which must have been prepared.
    """
    q, k, v = prepared.q, prepared.k, prepared.v
    out, lse = outputs(prepared, out, return_lse=return_lse)
    batch, heads, count, size = out.shape
    tile = tile_for(compute_capability(out.device), block_of(size))
    arguments = {
        "q": q.data,
        "q_scale": q.scale,
        "q_dots": q.dots,
        "k": k.data,
        "k_scale": k.scale,
        "k_bias": k.dots,
        **strided("v", v),
        **strided("o", out),
        "lse": lse,
        **lists(prepared, block_mask),
        "heads": heads,
        "count": count,
        "count_padded": q.data.shape[2],
        "keys": prepared.keys,
        "keys_padded": k.data.shape[2],
        "size": size,
        "SHARED": heads // v.shape[1],
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": block_of(size),
        "WHOLE_D": block_of(size) == size,
    }
    grid = (triton.cdiv(count, tile.block_m), batch * heads)
    launch(_int8_attention_kernel, grid, out.device, arguments, tile)
    return out if lse is None else (out, lse)


_sageattn = operator("sageattn", prepare_sageattn, attend)
_sageattn_3 = operator("sageattn_3", prepare_sageattn_3, attend)


@triton.jit
def scores(
    q, q_scale,  # [M, D'] int8, [M]
    k, k_scale, k_bias,  # one head's [M', D'] int8, [M'], [M'] or None
    start, keys, highest,
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """→ scores [M, N] and the factor [M, 1] that makes them powers of two, and the new highest
    [M] of those. With a bias the scores are scaled already."""
    columns = start + tl.arange(0, BLOCK_N)
    tile = tl.load(k + columns[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :])
    s = tl.dot(q, tl.trans(tile), out_dtype=tl.int32).to(tl.float32)
    if k_bias is None:
        # One scale serves the whole block of keys: it is left to the exponential's multiply-add.
        factor = q_scale * tl.load(k_scale + start)
    else:
        s = s * tl.load(k_scale + columns)[None, :] * q_scale[:, None]
        s += tl.load(k_bias + columns)[None, :]
        factor = tl.zeros_like(q_scale) + 1.0
    if MASKED:
        # Scaled first: a factor may be zero, and infinity times zero is not a number.
        s = tl.where((columns < keys)[None, :], s * factor[:, None], float("-inf"))
        factor = tl.zeros_like(q_scale) + 1.0
    return s, factor[:, None], tl.maximum(highest, tl.max(s, 1) * factor)


@triton.jit
def load_queries(q, q_scale, head, count_padded, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """→ rows [M], their data [M, D'] int8 and scale [M]; rows beyond the padding read its last."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    place = head.to(tl.int64) * count_padded + rows
    data = tl.load(q + place[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :])
    return rows, data, tl.load(q_scale + place)


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


@triton.jit
def _step(
    acc, total, highest,  # [M, D'], [M], [M]
    q, q_scale, k, k_scale, k_bias, v, v_n, v_d, start, keys, size,
    MASKED: tl.constexpr, WHOLE_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    s, factor, above = scores(
        q, q_scale, k, k_scale, k_bias, start, keys, highest, MASKED, BLOCK_N, BLOCK_D
    )
    p = tl.exp2(s * factor - above[:, None])
    rescale = tl.exp2(highest - above)
    rows = start + tl.arange(0, BLOCK_N)
    channels = tl.arange(0, BLOCK_D)
    places = v + rows.to(tl.int64)[:, None] * v_n + channels[None, :] * v_d
    if MASKED:
        inside = (rows < keys)[:, None] & (channels < size)[None, :]
        tile = tl.load(places, mask=inside, other=0.0)
    elif WHOLE_D:
        tile = tl.load(places)
    else:
        tile = tl.load(places, mask=(channels < size)[None, :], other=0.0)
    acc = tl.dot(p.to(tile.dtype), tile, acc * rescale[:, None])
    return acc, total * rescale + tl.sum(p, 1), above


@triton.jit(do_not_specialize=VARYING)
def _int8_attention_kernel(
    q, q_scale, q_dots,  # [B·H, N', D'] int8, [B·H, N'], [B·H, N'] or None
    k, k_scale, k_bias,  # [B·Hk, M', D'] int8, [B·Hk, M'], [B·H, M'] or None
    v, v_b, v_h, v_n, v_d,  # [B, Hk, M, D]
    o, o_b, o_h, o_n, o_d,  # [B, H, N, D]
    lse,  # [B·H, N] or None
    blocks, block_counts, block_tails, block_b, block_h,  # key_blocks.KeyBlocks, or None
    heads, count, count_padded, keys, keys_padded, size,
    SHARED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    WHOLE_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    rows, queries, row_scale = load_queries(q, q_scale, head, count_padded, BLOCK_M, BLOCK_D)
    key_head = (head // SHARED).to(tl.int64)
    k += key_head * keys_padded * BLOCK_D
    k_scale += key_head * keys_padded
    if k_bias is not None:
        k_bias += head.to(tl.int64) * keys_padded
    v += (head // heads).to(tl.int64) * v_b + (head % heads // SHARED).to(tl.int64) * v_h
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_block = tl.program_id(0) * BLOCK_M // _BLOCK
    place, whole, tail, end = walk(
        block_counts, block_tails, block_b, block_h, heads, head, row_block, keys, BLOCK_N
    )
    for position in range(0, whole, BLOCK_N):
        start = key_of(blocks, place, position, BLOCK_N)
        acc, total, highest = _step(
            acc, total, highest, queries, row_scale, k, k_scale, k_bias, v, v_n, v_d, start, keys,
            size, False, WHOLE_D, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    for start in range(tail, end, BLOCK_N):
        acc, total, highest = _step(
            acc, total, highest, queries, row_scale, k, k_scale, k_bias, v, v_n, v_d, start, keys,
            size, True, WHOLE_D, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    out = normalised(acc, total)
    store_output(out, o, o_b, o_h, o_n, o_d, heads, head, rows, count, size, BLOCK_D)
    if lse is not None:
        store_lse(lse, q_dots, head, rows, count, count_padded, highest, total)
