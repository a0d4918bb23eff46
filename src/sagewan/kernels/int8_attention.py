"""Attention with INT8 Q·Kᵀ and 16-bit P·V, in Triton, for compute capability 8.0 and newer.

:func:`sageattn` smooths K; :func:`sageattn_3` smooths Q and K, rotates both and rounds keys with
little error along themselves. A block of rows shares a scale. P·V multiplies in V's own 16-bit
format and adds in float32. No mask, no causal order, no dropout, no gradient. After SageAttention
(arXiv:2410.02367) and FlashAttention-2 (arXiv:2307.08691).
"""

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sagewan.errors import ShapeError
from sagewan.kernels.key_blocks import BLOCK, NO_BLOCKS, any_key_of, key_blocks, key_of, walk
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
from sagewan.kernels.prepared import Prepared, Rows
from sagewan.kernels.query_key import Grain, check_grain, grain_of, plain, smoothed, whole

_BLOCK = tl.constexpr(BLOCK)


def tile_for(sm: int, block_d: int) -> Tile:
    """The fixed configuration of a compute capability and a head size inside the kernel."""
    if block_d > 128:
        return Tile(block_m=64, block_n=32, warps=8, stages=2)
    if sm == 90:
        # Triton does not overlap a block's products with its exponentials here: a second block
        # on the multiprocessor does, and two of 256 threads leave each thread 128 registers.
        cut = Tile(block_m=128, block_n=64, warps=8, stages=3, registers=128)
        return replace(cut, tma=True, ahead=False)
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
    """As :func:`sageattn`, with Q smoothed too, both rotated, and keys rounded so that their error
    has little along themselves."""
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
    """The first half of :func:`sageattn`.

    ``k_mean`` [B, Hk, D'] float32 replaces K's own mean, which :func:`sequence.mean` gives: for a
    sequence that is spread over devices. ``with_lse`` prepares what the log-sum-exp needs.
    """
    check(q, k, v)
    return whole(q, k, plain(q, k, scale, _grain(q), k_mean=k_mean, with_lse=with_lse), v)


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
    rows = smoothed(q, k, scale, _grain(q), k_mean=k_mean, with_lse=with_lse, along=True)
    return whole(q, k, rows, v)


def _grain(q: Tensor) -> Grain:
    return grain_of(tile_for(compute_capability(q.device), block_of(q.shape[3])))


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
    check_grain(prepared, grain_of(tile))
    k_tiles = v_tiles = None
    if tile.tma:
        block_d = block_of(size)
        k_tiles = copied(k.data.view(-1, block_d), (tile.block_n, block_d))
        v_tiles = copied(v, (1, 1, tile.block_n, block_d))
    arguments = {
        "q": q.data,
        "q_scale": q.scale,
        "q_dots": q.dots,
        "k": k.data if k_tiles is None else k_tiles,
        "k_scale": k.scale,
        "k_bias": k.dots,
        **strided("v", v),
        "v_tiles": v_tiles,
        **strided("o", out),
        "lse": lse,
        **lists(prepared, block_mask),
        "heads": heads,
        "shared": heads // v.shape[1],
        "count": count,
        "count_padded": q.data.shape[2],
        "keys": prepared.keys,
        "keys_padded": k.data.shape[2],
        "size": size,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": block_of(size),
        "WHOLE_D": block_of(size) == size,
        "TMA": k_tiles is not None,
        "AHEAD": tile.ahead or k.dots is None,
    }
    grid = (triton.cdiv(count, tile.block_m), batch * heads)
    launch(_int8_attention_kernel, grid, out.device, arguments, tile)
    return out if lse is None else (out, lse)


_sageattn = operator("sageattn", prepare_sageattn, attend)
_sageattn_3 = operator("sageattn_3", prepare_sageattn_3, attend)


@triton.jit
def _step(
    acc, total, highest,  # [M, D'], [M, 8], [M]
    q, q_scale, k, k_row, scale, bias, v, v_n, v_d, v_tiles, batch, v_head, start, keys, size,
    ANY: tl.constexpr, BIASED: tl.constexpr, WHOLE_D: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    x, factor, offset, above = scores(
        q, q_scale, k, k_row, scale, bias, start, keys, highest, ANY, BIASED, TMA, BLOCK_M,
        BLOCK_N, BLOCK_D,
    )  # fmt: skip
    p = tl.exp2(x * factor + offset[:, None])
    rescale = tl.exp2(highest - above)
    rows = start + tl.arange(0, BLOCK_N)
    channels = tl.arange(0, BLOCK_D)
    places = v + rows.to(tl.int64)[:, None] * v_n + channels[None, :] * v_d
    if v_tiles is not None:
        tile = v_tiles.load([batch, v_head, start, 0]).reshape(BLOCK_N, BLOCK_D)
    elif ANY:
        inside = (rows < keys)[:, None] & (channels < size)[None, :]
        tile = tl.load(places, mask=inside, other=0.0)
    elif WHOLE_D:
        tile = tl.load(places)
    else:
        tile = tl.load(places, mask=(channels < size)[None, :], other=0.0)
    acc = tl.dot(p.to(tile.dtype), tile, acc * rescale[:, None])
    return acc, total * rescale[:, None] + partial_sums(p, BLOCK_M, BLOCK_N), above


@triton.jit(do_not_specialize=VARYING)
def _int8_attention_kernel(
    q, q_scale, q_dots,  # [B·H, N', D'] int8, [B·H, N'], [B·H, N'] or None
    k, k_scale, k_bias,  # [B·Hk·M', D'] int8 or its descriptor, [B·Hk, M'], [B·H, M'] or None
    v, v_b, v_h, v_n, v_d,  # [B, Hk, M, D]
    v_tiles,  # its descriptor, or None
    o, o_b, o_h, o_n, o_d,  # [B, H, N, D]
    lse,  # [B·H, N] or None
    blocks, block_counts, block_tails, block_b, block_h,  # key_blocks.KeyBlocks, or None
    heads, shared, count, count_padded, keys, keys_padded, size,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    WHOLE_D: tl.constexpr, TMA: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    BIASED: tl.constexpr = k_bias is not None
    head = tl.program_id(1)
    rows, queries, row_scale = load_queries(q, q_scale, head, count_padded, BLOCK_M, BLOCK_D)
    k_row = head // shared * keys_padded
    if not TMA:
        k += k_row.to(tl.int64) * BLOCK_D
    k_scale += k_row
    if k_bias is not None:
        k_bias += head.to(tl.int64) * keys_padded
    batch, v_head = head // heads, head % heads // shared
    v += batch.to(tl.int64) * v_b + v_head.to(tl.int64) * v_h
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
            acc, total, highest, queries, row_scale, k, k_row, scale, bias, v, v_n, v_d,
            v_tiles, batch, v_head, start, keys, size, False, BIASED, WHOLE_D, TMA, BLOCK_M,
            BLOCK_N, BLOCK_D,
        )  # fmt: skip
        if AHEAD:
            scale, bias = next_scale, next_bias
    for position in range(exact, whole + end - tail, BLOCK_N):
        start = any_key_of(blocks, place, position, whole, tail, BLOCK_N)
        scale, bias = of_keys(k_scale, k_bias, start, BLOCK_N)
        acc, total, highest = _step(
            acc, total, highest, queries, row_scale, k, k_row, scale, bias, v, v_n, v_d,
            v_tiles, batch, v_head, start, keys, size, True, BIASED, WHOLE_D, TMA, BLOCK_M,
            BLOCK_N, BLOCK_D,
        )  # fmt: skip
    total = tl.sum(total, 1)
    out = normalised(acc, total)
    store_output(out, o, o_b, o_h, o_n, o_d, heads, head, rows, count, size, BLOCK_D)
    if lse is not None:
        store_lse(lse, q_dots, head, rows, count, count_padded, highest, total)
