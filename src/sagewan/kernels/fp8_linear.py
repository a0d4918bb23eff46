"""Activations for FP8 products, in Triton: e4m3 with one scale for each row, in one pass.

A block holds a whole row in its registers: it is read once, its largest value found, and written
once. For 8.9 and newer, whose hardware converts to e4m3. NaN and infinities become NaN.
"""

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


def schedule_for(block: int) -> Schedule:
    """32 values a thread: two blocks and more share a multiprocessor."""
    return Schedule(warps=max(1, min(16, block // 1024)))


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
    block = triton.next_power_of_2(columns)
    arguments = {
        "x": flat,
        "stride": flat.stride(0),
        "data": out.data,
        "scale": out.scale,
        "columns": columns,
        "GELU": gelu,
        "BLOCK": block,
    }
    launch(_quantize_rows_kernel, (rows,), x.device, arguments, schedule_for(block))
    return out


@triton.jit
def row_scale(values):
    """[K] float32 → the scale of the row."""
    largest = tl.max(tl.abs(values), 0)
    # A NaN is no maximum; it stays a NaN in its place.
    return tl.where(largest > 0, largest / _HIGHEST, 1.0)


@triton.jit
def e4m3(values, scale):
    """[K] float32 by its row's scale. The conversion saturates, which only a last bit needs."""
    return (values * (1.0 / scale)).to(tl.float8e4nv)


@triton.jit
def _quantize_rows_kernel(
    x, stride,  # [M, K], K contiguous
    data,  # [M, K] float8_e4m3fn
    scale,  # [M] float32
    columns,
    GELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    inside = places < columns
    values = tl.load(x + row * stride + places, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        # ½·(1 + tanh(u)) is the logistic function of 2u.
        u = values * (_GELU_1 + _GELU_3 * values * values)
        # Beyond 2¹⁰⁰ the quotient is nothing long since, and float32 would overflow.
        values = values / (1.0 + tl.exp2(tl.minimum(u, 100.0)))
    step = row_scale(values)
    tl.store(scale + row, step)
    tl.store(data + row * columns + places, e4m3(values, step), mask=inside)
