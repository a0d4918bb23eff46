"""Q and K as the products give them → the form of ``sageattn_3_fp8`` on Hopper (9.0), in one pass.

RMS norm over all heads, rotary positions, smoothing, rotation and INT8: 16 bit is read, 8 bit
written, nothing between. What a row is to be divided by, and the mean that is taken off, are found
before, in a pass that writes nothing else and one over a sample of the tokens. The kernel is
``hopper_prepare.cu``; the two before are Triton. Heads of 128 channels.
"""

import ctypes
import math
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sagewan.errors import ShapeError
from sagewan.kernels.fp8_attention import E4M3_MAX
from sagewan.kernels.fp8_linear import cut, load_part
from sagewan.kernels.hopper_attention import CHANNELS
from sagewan.kernels.launch import VARYING, Schedule, launch
from sagewan.kernels.nvrtc import Kernel
from sagewan.kernels.prepare import Recipe, e4m3_columns
from sagewan.kernels.prepared import PADDING, Columns, Prepared, Rows
from sagewan.kernels.query_key import LOG2E, ROWS_PER_SCALE, lowest_scale
from sagewan.kernels.sequence import stride_of

SOURCE = "hopper_prepare.cu"
_THREADS = 128
# Of threads, to a multiprocessor: 168 registers for each.
_BLOCKS = 3
# How often the card is to be filled with blocks at least: in fewer, of more heads, the table of
# positions is read less often, but the last ones leave more of the card idle.
_FILLS = 2.5
_SAMPLE_ROWS, _SAMPLES = 32, 64
_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong, ctypes.c_float


@dataclass(frozen=True, kw_only=True)
class Position:
    """What a projection [B, N, H, D] still lacks: x / √(mean of squares over H and D + eps) ·
    weight [H·D], and its rotary positions: cos and sin float32 [1, N, 1, D]."""

    weight: Tensor
    eps: float
    cos: Tensor
    sin: Tensor


class _Arguments(ctypes.Structure):
    """``Arguments`` of the kernel."""

    _fields_ = (
        *((name, _P) for name in ("x", "factors", "weight", "cos", "sin", "minus", "other")),
        *((name, _P) for name in ("lowest", "data", "scales", "dots")),
        *((name, _L) for name in ("x_b", "x_n", "x_h")),
        ("factor", _F),
        ("dot_factor", _F),
        *((name, _I) for name in ("heads", "group", "groups", "count", "padded")),
    )


def defines(dtype: torch.dtype) -> dict[str, int]:
    """What the kernel's source is compiled with."""
    return {"HALF": int(dtype == torch.float16), "BLOCKS": _BLOCKS}


@cache
def _signs(device: torch.device) -> Tensor:
    """[128] float32: what the rotation multiplies each channel by first, as in
    :mod:`sagewan.kernels.prepare`."""
    bits = torch.arange(CHANNELS)
    pairs = bits & bits >> 1
    odd = (pairs ^ pairs >> 2 ^ pairs >> 4) & 1
    return (1.0 - 2.0 * odd).to(device)


@cache
def _kernel(device: int, dtype: torch.dtype) -> Kernel:
    with torch.cuda.device(device):
        return Kernel(SOURCE, "prepare", "sm_90a", defines(dtype), shared_bytes=0)


def prepare_projections(
    q: Tensor, k: Tensor, v: Tensor, for_q: Position, for_k: Position
) -> Prepared[Rows, Columns]:
    """q, k and v [B, N, H, D] as the products give them, rows without gaps → what
    :func:`sagewan.kernels.hopper_attention.attend` takes, in the form that
    :func:`sagewan.kernels.hopper_attention.prepare_sageattn_3_fp8` gives them, but for a scale for
    each 64 keys instead of 128. Raises ShapeError for other heads than of 128 channels."""
    scale = q.shape[3] ** -0.5
    q_factors, k_factors = row_factors(q, for_q.eps), row_factors(k, for_k.eps)
    q_mean, k_mean = turned_mean(q, q_factors, for_q), turned_mean(k, k_factors, for_k)
    recipe = Recipe(dot_factor=scale * LOG2E, smoothed=True)
    keys = int8_rows(k, k_factors, for_k, recipe, minus=k_mean, other=q_mean)
    recipe = Recipe(factor=scale * LOG2E)
    queries = int8_rows(q, q_factors, for_q, recipe, minus=q_mean, lowest=lowest_scale(keys))
    return Prepared(
        q=queries,
        k=keys,
        v=e4m3_columns(v.transpose(1, 2), E4M3_MAX),
        queries=q.shape[1],
        keys=k.shape[1],
        head_dim=q.shape[3],
        dtype=q.dtype,
    )


def row_factors(x: Tensor, eps: float) -> Tensor:
    """x [B, N, H, D], rows without gaps → 1 / √(mean of squares + eps) of each row, [B, N]."""
    batch, tokens, heads, size = x.shape
    _check(x)
    factors = torch.empty(batch, tokens, dtype=torch.float32, device=x.device)
    parts, block, schedule = cut(heads * size)
    arguments = {
        "x": x,
        "x_b": x.stride(0),
        "factors": factors,
        "tokens": tokens,
        "eps": eps,
        "COLUMNS": heads * size,
        "PARTS": parts,
        "BLOCK": block,
    }
    launch(_factors_kernel, (tokens, batch), x.device, arguments, schedule)
    return factors


def turned_mean(x: Tensor, factors: Tensor, position: Position) -> Tensor:
    """The mean over N of what x [B, N, H, D] becomes, [B, H, D] float32; of a long sequence, of
    its sample."""
    batch, tokens, heads, size = x.shape
    _check(x)
    every = stride_of(tokens)
    count = triton.cdiv(tokens, every)
    blocks = triton.cdiv(count, _SAMPLE_ROWS)
    samples = min(_SAMPLES, blocks)
    partial = torch.empty(batch, heads, samples, size, dtype=torch.float32, device=x.device)
    arguments = {
        "x": x,
        "x_b": x.stride(0),
        "factors": factors,
        "weight": position.weight,
        "cos": position.cos,
        "sin": position.sin,
        "partial": partial,
        "heads": heads,
        "count": tokens,
        "chunk": triton.cdiv(blocks, samples) * _SAMPLE_ROWS,
        "EVERY": every,
        "BLOCK_R": _SAMPLE_ROWS,
        "SIZE": size,
    }
    launch(_mean_kernel, (samples, batch * heads), x.device, arguments, Schedule(warps=4))
    return partial.sum(2).div_(count)


def int8_rows(
    x: Tensor,
    factors: Tensor,
    position: Position,
    recipe: Recipe,
    *,
    minus: Tensor,
    other: Tensor | None = None,
    lowest: Tensor | None = None,
) -> Rows:
    """As :func:`sagewan.kernels.prepare.int8_rows` of the rows that x [B, N, H, D] becomes, in the
    recipe's factors: rotated, 64 rows to a scale, dots of the smoothed rows."""
    batch, tokens, heads, size = x.shape
    _check(x)
    if not (position.cos.is_contiguous() and position.sin.is_contiguous()):
        raise ShapeError("the table of positions has gaps: give it contiguous")
    padded = triton.cdiv(tokens, PADDING) * PADDING
    dots = None if other is None else x.new_empty(batch, heads, padded, dtype=torch.float32)
    rows = Rows(
        data=x.new_empty(batch, heads, padded, size, dtype=torch.int8),
        scale=x.new_empty(batch, heads, padded, dtype=torch.float32),
        dots=dots,
        rows_per_scale=ROWS_PER_SCALE,
    )
    group = _heads_of_a_block(heads, batch * padded // ROWS_PER_SCALE, x.device)
    groups = triton.cdiv(heads, group)
    weight, signs = position.weight.float(), _signs(x.device)
    minus, other = minus * signs, None if other is None else other * signs

    def pointer(value: Tensor | None) -> int:
        return 0 if value is None else int(value.data_ptr())

    arguments = _Arguments(
        x=pointer(x),
        factors=pointer(factors),
        weight=pointer(weight),
        cos=pointer(position.cos),
        sin=pointer(position.sin),
        minus=pointer(minus),
        other=pointer(other),
        lowest=pointer(lowest),
        data=pointer(rows.data),
        scales=pointer(rows.scale),
        dots=pointer(dots),
        x_b=x.stride(0),
        x_n=x.stride(1),
        x_h=x.stride(2),
        factor=recipe.factor,
        dot_factor=recipe.dot_factor,
        heads=heads,
        group=group,
        groups=groups,
        count=tokens,
        padded=padded,
    )
    with torch.cuda.device(x.device):
        kernel = _kernel(x.device.index, x.dtype)
        kernel.launch((padded // ROWS_PER_SCALE, batch * groups), _THREADS, (), arguments)
    return rows


def _heads_of_a_block(heads: int, rows: int, device: torch.device) -> int:
    """How many of the heads a block goes through, of so many blocks of rows."""
    slots = _BLOCKS * torch.cuda.get_device_properties(device).multi_processor_count
    groups = min(heads, math.ceil(_FILLS * slots / rows))
    return -(-heads // groups)


def _check(x: Tensor) -> None:
    _, tokens, heads, size = x.shape
    if (
        size != CHANNELS
        or x.stride()[2:] != (size, 1)
        or (tokens > 1 and x.stride(1) != heads * size)
    ):
        raise ShapeError(f"{list(x.shape)} in strides {x.stride()}: give rows of heads of 128")


@triton.jit(do_not_specialize=("tokens",))
def _factors_kernel(
    x, x_b,  # [B, N, H·D]
    factors,  # [B, N] float32
    tokens, eps,
    COLUMNS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    squares = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        loaded = load_part(x + batch * x_b + token * COLUMNS, part, COLUMNS, BLOCK, True)
        squares += loaded * loaded
    factor = tl.rsqrt(tl.sum(squares, 0) / COLUMNS + eps)
    tl.store(factors + batch * tokens + token, factor)


@triton.jit(do_not_specialize=VARYING)
def _mean_kernel(
    x, x_b,  # [B, N, H, D]
    factors,  # [B, N] float32
    weight,  # [H·D]
    cos, sin,  # [N, D] float32
    partial,  # [B·H, samples, D] float32
    heads, count, chunk,
    EVERY: tl.constexpr, BLOCK_R: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1) % heads
    batch = (tl.program_id(1) // heads).to(tl.int64)
    channels = tl.arange(0, SIZE)[None, :]
    pair = 2 * tl.arange(0, SIZE // 2)[None, :]
    weights = tl.load(weight + head * SIZE + channels).to(tl.float32)
    even_total = tl.zeros((BLOCK_R, SIZE // 2), tl.float32)
    odd_total = tl.zeros((BLOCK_R, SIZE // 2), tl.float32)
    start = tl.program_id(0) * chunk
    for sample in range(start, tl.minimum(start + chunk, (count + EVERY - 1) // EVERY), BLOCK_R):
        token = ((sample + tl.arange(0, BLOCK_R)) * EVERY).to(tl.int64)[:, None]
        inside = (token < count) & (token >= start * EVERY) & (token < (start + chunk) * EVERY)
        factor = tl.load(factors + batch * count + token, mask=inside, other=0.0)
        place = x + batch * x_b + (token * heads + head) * SIZE + channels
        values = tl.load(place, mask=inside & (channels < SIZE), other=0.0).to(tl.float32)
        even, odd = tl.split((values * factor * weights).reshape(BLOCK_R, SIZE // 2, 2))
        turn_cos = tl.load(cos + token * SIZE + pair, mask=inside & (pair < SIZE), other=0.0)
        turn_sin = tl.load(sin + token * SIZE + pair + 1, mask=inside & (pair < SIZE), other=0.0)
        even_total += even * turn_cos - odd * turn_sin
        odd_total += even * turn_sin + odd * turn_cos
    total = tl.join(tl.sum(even_total, 0), tl.sum(odd_total, 0)).reshape(SIZE)
    place = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * SIZE
    tl.store(partial + place + tl.arange(0, SIZE), total)
