"""Activations for FP8 products, in Triton: e4m3 with one scale for each row, in one pass.

A block holds a whole row in its registers: it is read once, its largest value found, and written
once. For 8.9 and newer, whose hardware converts to e4m3. NaN and infinities become NaN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sagewan.errors import ShapeError
from sagewan.kernels.launch import Schedule, launch

MAX_COLUMNS = 65536
_HIGHEST = tl.constexpr(448.0)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] in 16 or 32 bit → data float8_e4m3fn [M, K] and scale float32 [M, 1], largest / 448.

    Raises ShapeError for more columns than a block holds.
    """
    rows, columns = x.shape
    if columns > MAX_COLUMNS:
        raise ShapeError(f"{columns} columns: the kernel takes up to {MAX_COLUMNS}")
    x = x if x.stride(1) == 1 else x.contiguous()
    data = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(columns)
    arguments = {
        "x": x,
        "stride": x.stride(0),
        "data": data,
        "scale": scale,
        "columns": columns,
        "BLOCK": block,
    }
    # 32 values a thread: two blocks and more share a multiprocessor.
    schedule = Schedule(warps=max(1, min(16, block // 1024)))
    launch(_quantize_rows_kernel, (rows,), x.device, arguments, schedule)
    return data, scale


@triton.jit
def _quantize_rows_kernel(
    x, stride,  # [M, K], K contiguous
    data,  # [M, K] float8_e4m3fn
    scale,  # [M] float32
    columns,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    inside = places < columns
    values = tl.load(x + row * stride + places, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(values), 0)
    # A NaN is no maximum; it stays a NaN in its place.
    step = tl.where(largest > 0, largest / _HIGHEST, 1.0)
    tl.store(scale + row, step)
    scaled = tl.clamp(values / step, -_HIGHEST, _HIGHEST, propagate_nan=tl.PropagateNan.ALL)
    tl.store(data + row * columns + places, scaled.to(tl.float8e4nv), mask=inside)
