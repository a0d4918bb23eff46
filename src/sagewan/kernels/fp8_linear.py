"""Activations for FP8 products, in Triton: e4m3 with one scale for each row, in one pass.

A block holds a whole row in its registers: it is read once, its largest value found, and written
once. For 8.9 and newer, whose hardware converts to e4m3. NaN and infinities become NaN.
"""

from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from sagewan.errors import ShapeError
from sagewan.kernels.fp8_rows import Fp8Rows
from sagewan.kernels.launch import Schedule, launch

MAX_COLUMNS = 65536
_HIGHEST = tl.constexpr(448.0)
# −2·√(2/π)·log₂e, and the same times .044715, GELU's share of the cube.
_GELU_1 = tl.constexpr(-2.302208198144325)
_GELU_3 = tl.constexpr(-0.10294324)


@cache
def cut(columns: int) -> tuple[int, int, Schedule]:
    """How a block holds a row: up to eight parts of a power of two of columns, so that few lanes
    lie beyond its end; their number, their size, and a thread for eight columns of a part."""
    size = max(256, triton.next_power_of_2(triton.cdiv(columns, 8)))
    return triton.cdiv(columns, size), size, Schedule(warps=size // 256)


def quantize_rows(x: Tensor, *, gelu: bool = False) -> Fp8Rows:
    """x [..., K] in 16 or 32 bit → its rows as FP8, scale largest / 448; with ``gelu`` after the
    approximation of GELU by tanh, computed in float32.

    Raises ShapeError for more columns than a block holds.
    """
    rows, columns = x.numel() // x.shape[-1], x.shape[-1]
    if columns > MAX_COLUMNS:
        raise ShapeError(f"{columns} columns: the kernel takes up to {MAX_COLUMNS}")
    flat = x.reshape(-1, columns)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    out = Fp8Rows.empty(*x.shape, device=x.device)
    parts, block, schedule = cut(columns)
    arguments = {
        "x": flat,
        "stride": flat.stride(0),
        "data": out.data,
        "scale": out.scale,
        "GELU": gelu,
        "COLUMNS": columns,
        "PARTS": parts,
        "BLOCK": block,
    }
    launch(_quantize_rows_kernel, (rows,), x.device, arguments, schedule)
    return out


@triton.jit
def load_part(x, part, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, STREAM: tl.constexpr):
    """One part of a row, in float32; zeros beyond its end, which only the last part may have."""
    # What streams by once is not to push what all rows share out of the near cache.
    cache: tl.constexpr = ".cg" if STREAM else ""
    places = part * BLOCK + tl.arange(0, BLOCK)
    if (part + 1) * BLOCK <= COLUMNS:
        loaded = tl.load(x + places, cache_modifier=cache)
    else:
        loaded = tl.load(x + places, mask=places < COLUMNS, other=0.0, cache_modifier=cache)
    return loaded.to(tl.float32)


@triton.jit
def store_part(x, values, part, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    places = part * BLOCK + tl.arange(0, BLOCK)
    if (part + 1) * BLOCK <= COLUMNS:
        tl.store(x + places, values)
    else:
        tl.store(x + places, values, mask=places < COLUMNS)


@triton.jit
def store_fp8(data, scale, values, PARTS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """A row's parts as e4m3 with one scale. The conversion saturates, which only a last bit needs;
    a NaN is no maximum, and stays a NaN in its place."""
    largest = tl.abs(values[0])
    for part in tl.static_range(1, PARTS):
        largest = tl.maximum(largest, tl.abs(values[part]))
    top = tl.max(largest, 0)
    # Rows of zeros, and those so small that their factor would overflow, are stored as zeros.
    step = tl.where(top > 1e-30, top / _HIGHEST, 1.0)
    tl.store(scale, step)
    factor = 1.0 / step
    for part in tl.static_range(PARTS):
        store_part(data, (values[part] * factor).to(tl.float8e4nv), part, COLUMNS, BLOCK)


@triton.jit
def _quantize_rows_kernel(
    x, stride,  # [M, K], K contiguous
    data,  # [M, K] float8_e4m3fn
    scale,  # [M] float32
    GELU: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    values = ()
    for part in tl.static_range(PARTS):
        loaded = load_part(x + row * stride, part, COLUMNS, BLOCK, True)
        if GELU:
            # ½·(1 + tanh(u)) is the logistic function of 2u.
            u = loaded * (_GELU_1 + _GELU_3 * loaded * loaded)
            # Beyond 2¹⁰⁰ the quotient is nothing long since, and float32 would overflow.
            loaded = loaded / (1.0 + tl.exp2(tl.minimum(u, 100.0)))
        values = values + (loaded,)
    store_fp8(data + row * COLUMNS, scale + row, values, PARTS, COLUMNS, BLOCK)
